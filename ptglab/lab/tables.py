"""What the rows of `results.csv` say together: arms, means over seeds, gains over scratch."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ptglab.train.controls import CONTROLS

NOISE = ["noise", "noise_rate"]  # of what is compared; human labels are told apart by their column
SETTING = ["dataset", "n_train", *NOISE, "seed"]  # of a pair of rows whose difference is a gain
SELF_SUPERVISED = ["simclr", "barlow_twins", "vicreg", "emp_ssl"]


def arms(results: pd.DataFrame) -> pd.DataFrame:
    """Return `results` with a column `arm`: its start, mode and recipe, as "simclr + linear, gce"; plain "scratch".

    Human labels become a kind of noise of their own, named as their column, at their mean effective rate; -1 where
    nobody knows it.
    """
    labels = results["labels"].astype("object")
    human = labels.notna()
    rate = results.groupby(["dataset", labels.fillna("")])["effective_rate"].transform("mean").fillna(-1)
    frame = results.assign(
        noise=labels.where(human, results["noise"]),
        noise_rate=rate.where(human, results["noise_rate"]).round(2),
    )
    names = frame["init"] + " + " + frame["mode"] + (", " + frame["recipe"]).where(frame["recipe"] != "plain", "")
    return frame.assign(arm=names.replace("scratch + full", "scratch"))


def experiments(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row an experiment of what `arms` returns; accuracies and times are the same for all its detectors."""
    return frame.drop_duplicates(["arm", "backbone", "loss", *SETTING])


def settings(frame: pd.DataFrame) -> list[tuple[str, float]]:
    """Return the kinds of noise, in order of their first row, each with its rates, rising."""
    first = {kind: place for place, kind in enumerate(frame["noise"].unique())}
    pairs = frame[NOISE].drop_duplicates().itertuples(index=False, name=None)
    return sorted(pairs, key=lambda pair: (first[pair[0]], pair[1]))


def over_seeds(frame: pd.DataFrame, measure: str, keys: Sequence[str]) -> pd.DataFrame:
    """Return `mean`, `deviation` (sample standard, NaN if n is 1) and `n` of `measure` for each of `keys`, in order."""
    grouped = frame.dropna(subset=[measure]).groupby(list(keys), sort=False)[measure]
    return pd.DataFrame({"mean": grouped.mean(), "deviation": grouped.std(), "n": grouped.count()}).reset_index()


def grid(frame: pd.DataFrame, measure: str) -> tuple[list[str], np.ndarray, np.ndarray, pd.DataFrame]:
    """Return (arms [R], mean [R, C] of a measure, its texts [R, C], the rows they are made of); C are `settings`."""
    found = over_seeds(frame, measure, ["arm", *NOISE])
    rows, columns = list(found["arm"].unique()), settings(frame)
    whole = found.set_index(["arm", *NOISE]).reindex([(arm, *setting) for arm in rows for setting in columns])
    texts = ["" if np.isnan(m) else text(m, d) for m, d in zip(whole["mean"], whole["deviation"], strict=True)]
    shape = len(rows), len(columns)
    return rows, whole["mean"].to_numpy().reshape(shape), np.array(texts).reshape(shape), found


def by_rate(frame: pd.DataFrame, measure: str, kind: str) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Return {arm: (rate [R], mean [R], deviation [R])} of a measure under a kind of noise, and the rows behind it."""
    found = over_seeds(frame[frame["noise"] == kind], measure, ["arm", "noise", "noise_rate"])
    found = found.sort_values("noise_rate", kind="stable", ignore_index=True).assign(measure=measure)
    order = frame["arm"].unique()
    lines = {arm: found.loc[found["arm"] == arm, ["noise_rate", "mean", "deviation"]].to_numpy().T for arm in order}
    return {arm: line for arm, line in lines.items() if line.size}, found


def span(found: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """Return the limits, in percent, between which all means and deviations of `over_seeds` lie, with a margin."""
    every = pd.concat(found)
    if every.empty:
        return 0.0, 100.0
    deviation = every["deviation"].fillna(0)
    low = 100 * (every["mean"] - deviation).min()
    high = 100 * (every["mean"] + deviation).max()
    margin = 0.05 * (high - low) + 1
    return low - margin, high + margin


def gains(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the rows of every arm but scratch with `gain`: `measure` less scratch's under the same labels and seed.

    Rows without such a partner are left out.
    """
    scratch = frame.loc[frame["arm"] == "scratch", [*SETTING, measure]]
    pairs = frame[frame["arm"] != "scratch"].merge(scratch, on=SETTING, suffixes=("", "_scratch"))
    return pairs.assign(gain=pairs[measure] - pairs[f"{measure}_scratch"])


def decompose(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the gain over scratch in two parts, a row for each noise that has scratch, a control and a method.

    `freezing`: the best of CONTROLS less scratch, what not training the backbone gives; `features`: the best of
    SELF_SUPERVISED less that control. Both with linear heads, best on average, seed by seed; `said` puts it in words.
    """
    linear = frame[(frame["recipe"] == "plain") & ((frame["mode"] == "linear") | (frame["arm"] == "scratch"))]
    gained, rows = gains(linear, measure).pivot_table("gain", SETTING, "init"), []
    for (*_, kind, rate), seeds in gained.groupby(SETTING[:-1]):
        mean = seeds.dropna(axis=1).mean()
        best = (mean[mean.index.isin(names)].nlargest(1).index for names in (CONTROLS, SELF_SUPERVISED))
        for control, start in zip(*best, strict=False):  # none if either is missing
            freezing, features = seeds[control], seeds[start] - seeds[control]
            gives, adds = (text(part.mean(), part.std()) for part in (freezing, features))
            said = (f"{kind} {rate:.0%}: not training the backbone gives {gives} points ({control} less scratch), the "
                    f"features add {adds} ({start} less {control}); n = {len(seeds)}")  # fmt: skip
            rows.append([kind, rate, control, start, freezing.mean(), features.mean(), said])
    return pd.DataFrame(rows, columns=[*NOISE, "control", "start", "freezing", "features", "said"])


def compare_published(frame: pd.DataFrame, measure: str, published: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return scratch, the best self-supervised arm (plain recipe) and the gain: ours, called `name`, and the published.

    published: rows of dataset, noise, noise_rate, labels, init (one of ours, or ssl), recipe, accuracy, source.
    """
    plain = frame[frame["recipe"] == "plain"]
    found = over_seeds(plain, measure, ["dataset", "arm", "init", *NOISE])
    known = found[found["init"] == "scratch"].set_index(["dataset", *NOISE])
    best = found[found["init"].isin(SELF_SUPERVISED)].sort_values("mean", ascending=False)
    best = best.drop_duplicates(["dataset", *NOISE]).set_index(["dataset", *NOISE])
    ours = pd.DataFrame({"scratch": known["mean"], "pre-trained": best["mean"], "arm": best["arm"], "n": best["n"]})
    theirs = published.assign(start=published["init"].replace(["ssl", *SELF_SUPERVISED], "pre-trained"))
    theirs = theirs[(theirs["recipe"] == "plain") & (theirs["init"] != "imagenet")]
    theirs["noise"] = theirs["labels"].where(theirs["labels"].notna(), theirs["noise"])
    theirs = theirs.pivot_table("accuracy", ["source", "dataset", *NOISE], "start", "max", dropna=False, observed=True)
    both = pd.concat([ours.reset_index().assign(source=name), theirs.dropna(how="all").reset_index()])
    return both.assign(gain=both["pre-trained"] - both["scratch"]).set_index(["source", "dataset", *NOISE]).round(3)


def heading(kind: str, rate: float) -> str:
    """Return a kind of noise and its rate, one above the other."""
    return f"{kind.removeprefix('label_')}\n{f'{rate:.0%}' if rate >= 0 else 'rate unknown'}"


def text(mean: float, deviation: float) -> str:
    """Return a mean and its deviation, shares, in percent: "71.2 ± 0.4", or "71.2" where there is none."""
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if deviation == deviation else "")
