"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "licences": FetchEntry(
        kind="sdist",
        package="scancode-toolkit-mini",
        version="32.5.0",
        file="",
        sha256="4325f6a4772bf2fb0ab764e8d421274fe07be6d2a1b4fc8be64daf7d9d651814",
        size=22_276_051,
        licence="licence texts are their authors', the collection CC-BY-4.0",
        archive="4325f6a4772bf2fb0ab764e8d421274fe07be6d2a1b4fc8be64daf7d9d651814",
    ),
}
