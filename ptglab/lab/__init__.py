"""Run folders, notebooks, sweeps, tables, metrics and figures."""
