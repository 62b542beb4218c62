"""`--verify`: every finished shard is read and compared with the checksum in its record."""

from __future__ import annotations

import logging
from pathlib import Path

from segpipe.records import PUBLISH, read_records
from segpipe.stages.manifest import forget
from segpipe.stages.places import work_folder
from segpipe.store import Shard, damaged_shard

log = logging.getLogger(__name__)


def remove_damaged(out: Path, name: str) -> int:
    """Remove the shards of an image that are not what was recorded, so that they are made again.

    Returns how many there were. What `clean` has removed the records of cannot be checked so; the
    inner chunks still carry a crc32c, which is checked whenever they are read.
    """
    recorded: dict[tuple[str, Path, str], Shard] = {}
    for folder in sorted((work_folder(out, name) / "records").glob("*/")):
        # what is published came last
        for one in sorted(read_records(folder), key=lambda one: one.pass_name == PUBLISH):
            if one.shard is not None and one.array is not None:
                array = (folder / one.array).resolve()
                if (array / "zarr.json").exists():
                    recorded[folder.name, array, one.region] = one.shard
    damaged = 0
    for (stage, array, region), shard in recorded.items():
        file = damaged_shard(array, region, shard)
        if file is not None:
            log.warning("%s: %s: %s is damaged; its region is done again", name, stage, file)
            file.unlink(missing_ok=True)
            forget(out, name, [stage], records=False)
            damaged += 1
    log.info("%s: %d shards are verified, %d were damaged", name, len(recorded), damaged)
    return damaged
