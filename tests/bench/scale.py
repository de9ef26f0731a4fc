"""How cost grows with the number of images: CPU seconds of each stage, and their exponent."""

import numpy as np
import pandas as pd

ALL = "all stages"


def exponent(sizes, seconds) -> float:
    """Return e of the least-squares fit seconds = c x size^e, on logarithms."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(seconds)), 1)[0])


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Return CPU seconds [sizes, stages] of `frame`, the rows of scale.csv; detectors together, tables with loading.

    A stage measured on a sample of the images counts in proportion.
    """
    timed = frame[frame["cpu_seconds"].notna()]
    timed = timed.assign(cpu_seconds=timed["cpu_seconds"] * timed["images"] / timed["measured"])
    table = timed.pivot_table(index="images", columns="stage", values="cpu_seconds", aggfunc="sum", sort=False)
    detectors = list(frame.loc[frame["precision"].notna(), "stage"].unique())
    for name, parts in {"detection": detectors, "loading and tables": ["load again", "tables and gallery"]}.items():
        table = table.assign(**{name: table[parts].sum(axis=1)}).drop(columns=parts)
    return table.assign(**{ALL: table.sum(axis=1)})


def exponents(frame: pd.DataFrame) -> pd.Series:
    """Return the exponent of each of the `curves` in the number of images."""
    table = curves(frame)
    return table.apply(lambda seconds: exponent(table.index, seconds))
