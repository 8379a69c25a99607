"""The YAML files of the plugin `primer`; a package, so that Hydra finds them as `pkg://trivium_plugins.primer.conf`."""
