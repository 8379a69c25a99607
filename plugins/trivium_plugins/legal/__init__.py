"""Licence texts, their categories and SPDX names; fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="legal",
    conf="pkg://trivium_plugins.legal.conf",
    sources={
        "legal": Entry(
            "trivium_plugins.legal.source:Legal",
            "trivium_plugins.legal.config:LegalConfig",
            help="licence texts, their categories and SPDX names",
        )
    },
    help="licence texts, their categories and SPDX names",
)
