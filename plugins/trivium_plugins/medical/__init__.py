"""Medicine: codes of diseases to match with their meaning, findings and their definitions, a manual of surgery."""

from trivium import Entry, Plugin

plugin = Plugin(
    name="medical",
    conf="pkg://trivium_plugins.medical.conf",
    sources={
        "medical": Entry(
            "trivium_plugins.medical.source:Medical",
            "trivium_plugins.medical.config:MedicalConfig",
            help="ICD-10-CM codes, HPO definitions, and a manual of surgery",
        )
    },
    help="verifiable questions about ICD-10-CM codes, definitions of findings, a manual of surgery",
)
