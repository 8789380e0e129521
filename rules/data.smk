"""Data: archives and folders -> packed images, or a fingerprint of images read in place."""

from hovit.utils.code_hash import code_hash


rule data:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/images.npy",
        "data/packed/{pack}/manifest.csv",
    log:
        "logs/data/{pack}.log",
    wildcard_constraints:
        pack=one_of(PACKS.keys() - IN_PLACE),
    threads: 2
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=code_hash("data"),
    shell:
        "python -m hovit data {wildcards.pack} > {log} 2>&1"


# COCO and ImageNet are read in place: the rule checks them and computes a fingerprint.
use rule data as data_in_place with:
    output:
        "data/packed/{pack}/pack.json",
        "data/packed/{pack}/manifest.csv",
    wildcard_constraints:
        pack=one_of(IN_PLACE),
    params:
        spec=lambda w: PACKS[w.pack].spec_hash,
        code=lambda w: code_hash(
            "data" if PACKS[w.pack].dataset.reads_files else "detection"
        ),
