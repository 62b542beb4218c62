"""What is known before the work: models and the plan, and at what price."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fields import SIZES, nuclei, run
from segpipe import prepare, store
from segpipe.errors import SettingsError
from segpipe.inputs import find_inputs
from segpipe.records import read_json
from segpipe.settings import load_settings

NO_TORCH = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from segpipe.run import predict
from segpipe.settings import load_settings

result = predict([Path({image!r})], Path({out!r}), load_settings(None, {sets!r}), stages=({stage!r},))
raise SystemExit(result.exit_code)
"""


def test_jobs_that_do_not_infer_import_no_torch_once_it_was_measured(tmp_path):
    """It costs a second and 200 MB in each of the jobs of a workflow; without a folder in which things
    can be kept it is imported."""
    image, out = nuclei(tmp_path / "a.tif", (100, 90)), tmp_path / "out"
    sets = [*SIZES, "engine.kind=serial", "measure.preview=true"]
    assert run(image, out, "measure.preview=true", stages=("tile", "infer")).exit_code == 0
    (out / "manifests" / "a.tile.json").unlink()
    for stage in ("tile", "stitch", "measure"):
        code = NO_TORCH.format(image=str(image), out=str(out), sets=sets, stage=stage)
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert (out / "a.png").exists()
    nowhere = os.environ | {"SEGPIPE_CACHE": "/proc/none"}
    ran = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "torch" in ran.stderr


def test_the_plan_for_a_gpu_is_made_where_there_is_none_but_infer_is_refused(tmp_path, monkeypatch):
    """The workflow plans on a login node; by hand the plan of a device that is not here is no use."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    image, out = nuclei(tmp_path / "a.tif", (70, 70)), tmp_path / "out"
    with pytest.raises(SettingsError, match="device cuda was asked for"):
        run(image, out, "infer.device=cuda")
    assert not (out / "manifests" / "plan.json").exists()
    assert run(image, out, "infer.device=cuda", stages=("tile",)).exit_code == 0
    assert read_json(out / "manifests" / "plan.json") == {
        "batch": 8,
        "region": 4096,
        "backend": "eager",
    }


@pytest.mark.parametrize("shape", [(100_000, 100_000), (250_000, 40_000)])
def test_ten_gigapixels_are_few_files(tmp_path, shape):
    """File systems of clusters count them: 2,000 that stay and 6,000 while it runs at most."""
    path, grid = tmp_path / "large.ome.zarr", store.Grid.fitting(shape, 4096, 512)
    store.create_image(
        path, ["DAPI"], grid, np.dtype(np.uint8), pixel_size_um=0.5, name="large", rgb=False
    )  # no pixels: all are 0
    found = find_inputs([path], tmp_path / "out")
    prepared = prepare.prepare(found, tmp_path / "out", load_settings(None, ["infer.device=cpu"]))
    (image,) = prepared.images
    assert image.region == 4096
    assert prepared.final_file_count(image) <= 2000
    assert prepared.file_count(image, writers=64) <= 6000
