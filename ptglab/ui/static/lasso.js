// Tells the kernel which points of the scatter beside it were selected. The scatter's own messages hold the latest event
// alone: while the kernel is busy, one of hovering takes the place of the selection before it.
function render({ model, el }) {
  let plot = null;
  let over = false;
  const rows = (event) => event?.points && model.send({ rows: event.points.map((point) => point.pointNumber) });
  const none = () => model.send({ rows: null });
  const attach = () => {
    if (over) return;
    plot = el.closest(".ptglab-explorer")?.querySelector(".js-plotly-plot");
    if (!plot?.on) return void setTimeout(attach, 100);
    plot.on("plotly_selected", rows);
    plot.on("plotly_click", rows);
    plot.on("plotly_deselect", none);
  };
  attach();
  return () => {
    over = true;
    for (const name of ["plotly_selected", "plotly_click"]) plot?.removeListener?.(name, rows);
    plot?.removeListener?.("plotly_deselect", none);
  };
}

export default { render };
