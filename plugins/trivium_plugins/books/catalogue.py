"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "big_text": FetchEntry(
        kind="sdist",
        package="scancode-toolkit-mini",
        version="32.5.0",
        file="src/textcode/data/gibberish/big.txt",
        sha256="fa066c7d40f0f201ac4144e652aa62430e58a6b3805ec70650f678da5804e87b",
        size=6_488_666,
        licence="public domain",
        archive="4325f6a4772bf2fb0ab764e8d421274fe07be6d2a1b4fc8be64daf7d9d651814",
    ),
    "austen_index": FetchEntry(
        kind="debian",
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        file="usr/lib/R/site-library/janeaustenr/data/Rdata.rdx",
        sha256="cab8cbe4ce965d3b42b35c03383bafccc0eb78151f70e4748ead45270470c22f",
        size=262,
        licence="public domain",
        pool="pool/main/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    ),
    "austen": FetchEntry(
        kind="debian",
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        file="usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
        sha256="8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
        size=1_601_335,
        licence="public domain",
        pool="pool/main/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    ),
}
