"""Tools for JupyterLab: review suspects, explore images."""
