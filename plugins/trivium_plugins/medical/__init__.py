"""ICD-10-CM codes, HPO definitions, a manual of surgery; fetched when first used."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="medical",
    conf="pkg://trivium_plugins.medical.conf",
    sources={
        "medical": Entry(
            "trivium_plugins.medical.source:Medical",
            "trivium_plugins.medical.config:MedicalConfig",
            help="ICD-10-CM codes, HPO definitions, a manual of surgery",
        )
    },
    help="ICD-10-CM codes, HPO definitions, a manual of surgery",
)
