"""Hydra accepts launchers only from modules under hydra_plugins; the code is in trivium.sweep."""

from trivium.sweep.launcher import ProcessLauncher as _ProcessLauncher


class ProcessLauncher(_ProcessLauncher):
    """`hydra/launcher=process`."""
