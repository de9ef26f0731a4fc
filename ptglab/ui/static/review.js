// A page of thumbnails, and the keys of the box around it. Whatever comes from data is set as text, never as HTML.
const SEEN = "ptglab-review";

function card(content, place, send) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "ptglab-card";
  const picture = document.createElement("img");
  picture.src = content.picture;
  picture.alt = content.alt;
  const labels = document.createElement("span");
  labels.textContent = content.text;
  const mark = document.createElement("span");
  mark.className = "ptglab-mark";
  button.append(picture, labels, mark);
  button.addEventListener("click", () => send({ go: place }));
  return button;
}

function render({ model, el }) {
  const end = new AbortController();
  const page = document.createElement("div");
  page.className = "ptglab-page";
  page.setAttribute("role", "group");
  page.setAttribute("aria-label", "Suspects of this page");
  el.append(page);
  // The row on the screen goes along: a key that was pressed for an earlier picture decides nothing.
  const send = (content) => model.send({ ...content, row: model.get("state").row });
  const marked = () => {
    const { marks = [], place } = model.get("state");
    [...page.children].forEach((button, i) => {
      button.querySelector(".ptglab-mark").textContent = marks[i] ?? "";
      button.classList.toggle("ptglab-decided", Boolean(marks[i]));
      if (i === place) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    });
  };
  const filled = () => {
    page.replaceChildren(...model.get("cards").map((content, i) => card(content, i, send)));
    marked();
  };
  const changes = [["change:cards", filled], ["change:state", marked]];
  for (const [name, act] of changes) model.on(name, act);
  filled();

  const box = () => el.closest(`.${SEEN}`);
  const prepare = () => {
    if (end.signal.aborted) return;
    const around = box();
    if (!around) return void requestAnimationFrame(prepare);
    around.tabIndex = 0;
    around.setAttribute("role", "region");
    around.setAttribute("aria-label", "Review of suspects; keys work in here");
    for (const own of around.querySelectorAll(".widget-slider, .widget-dropdown, .widget-checkbox")) {
      own.dataset.lmSuppressShortcuts = "true"; // their keys are theirs, not JupyterLab's
    }
  };
  prepare();

  // On the window, before JupyterLab, to which a single letter may mean to cut the cell; Ctrl+S and its like stay its own.
  const pressed = (event) => {
    const [around, target] = [box(), event.target];
    if (!around || !around.contains(target)) return;
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const key = event.key === " " ? "space" : event.key.toLowerCase();
    if (target.closest(".noUi-target, .widget-slider")) return;
    if (target.closest("input, textarea, select, [contenteditable=true]")) {
      if (key === "escape") around.focus({ preventScroll: true });
      if (key !== "enter" || !target.closest(".ptglab-class")) return;
      event.preventDefault();
      event.stopPropagation();
      around.focus({ preventScroll: true });
      send({ key: "choose" });
      return;
    }
    const ours = model.get("wanted").includes(key);
    if (ours || event.key.length === 1) event.stopPropagation();
    const itself = target.closest("button") && (key === "enter" || key === "space"); // a button's own keys
    if (itself || !ours) return;
    event.preventDefault();
    if (key === "c") return void around.querySelector(".ptglab-class select")?.focus();
    if (!event.repeat || key.startsWith("arrow")) send({ key });
  };
  // After a click with the mouse the keys are the box's again, not the button's.
  const clicked = (event) => {
    const around = box();
    if (around && event.detail > 0 && around.contains(event.target) && event.target.closest("button")) {
      around.focus({ preventScroll: true });
    }
  };
  window.addEventListener("keydown", pressed, { signal: end.signal, capture: true });
  document.addEventListener("click", clicked, { signal: end.signal });
  return () => {
    end.abort();
    for (const [name, act] of changes) model.off(name, act);
  };
}

export default { render };
