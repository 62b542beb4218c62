"""`doctor`: what an installation can do on this machine, and what is broken, for a request for help."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from segpipe import __version__
from segpipe.backend import EAGER, OPENVINO
from segpipe.errors import SegpipeError
from segpipe.machine import (
    cpu_name,
    memory_bytes,
    memory_limit_bytes,
    usable_cores,
    usable_memory_bytes,
)
from segpipe.models.modelfile import list_models, read_card
from segpipe.report import bytes_text, library_versions
from segpipe.slide.source import printable
from segpipe.user_cache import FOLDER_VARIABLE, cache_folder, kept_bytes
from segpipe.workflow import find_snakefile

OK, MISSING, PROBLEM = "ok", "missing", "problem"
_READERS = "segpipe.slide"
EXTRAS = {
    "wsi": ((f"{_READERS}.openslide_reader",), "MRXS, VMS, SVSLIDE, BIF and DICOM slides"),
    "bioio": ((f"{_READERS}.czi_reader", f"{_READERS}.bioio_reader"), "CZI, ND2 and LIF files"),
    "remote": (("fsspec", "aiohttp", "s3fs"), "OME-Zarr over http and s3"),
    "anndata": (("h5py", "anndata"), "--export anndata"),
    "export": (("onnx", "onnxscript", "bioimageio.spec"), "models for other programs"),
    "workflow": (("snakemake",), "runs on a cluster"),
    "demo": (("skimage",), "the real image of the demo"),
}
"""By the name that pip knows: modules that it brings, or ours that need them; and what for."""
NVIDIA = Path("/proc/driver/nvidia/version")
"""There where the driver of a GPU is."""
LITTLE_BYTES = 1_000_000_000
"""Of disk: nothing but the smallest image can be segmented with less."""
WRITTEN_BYTES = 32_000_000


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    state
        `ok`; `missing`: it can be done without; `problem`: segpipe will fail.
    remedy
        What to do, where it is not ok.
    """

    key: str
    state: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """For people."""
        mark = "" if self.state == OK else f"{self.state}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.key:<12}{mark}{self.text}{remedy}"


def examine(out: Path | None = None) -> Iterator[Finding]:
    """What there is, one finding after the other.

    Parameters
    ----------
    out
        A folder for results, there or not, that is to be tried too.
    """
    yield Finding("segpipe", OK, f"{__version__}, {Path(__file__).parent}")
    yield Finding("python", OK, f"{sys.version.split()[0]}, {sys.executable}")
    yield Finding("platform", OK, platform.platform())
    yield from _packages()
    yield from _hardware()
    yield from _devices()
    yield from _extras()
    yield from _models()
    yield _tried("snakefile", lambda: f"{find_snakefile()}", "install segpipe again")
    yield _kept()
    yield _folder("temporary", Path(tempfile.gettempdir()))
    if out is not None:
        yield _folder("output", out)


def to_json(found: list[Finding]) -> dict[str, object]:
    """For machines."""
    problems = [one.key for one in found if one.state == PROBLEM]
    return {
        "versions": {"segpipe": __version__, "python": platform.python_version()}
        | library_versions(),
        "findings": [asdict(one) for one in found],
        "problems": problems,
    }


def _tried(key: str, find: Callable[[], str], remedy: str) -> Finding:
    """What a function tells; a problem when it raises."""
    try:
        return Finding(key, OK, find())
    except Exception as error:  # noqa: BLE001  whatever is wrong with it is the finding
        why = printable(str(error) or type(error).__name__, 400)
        return Finding(key, PROBLEM, why, remedy)


def _packages() -> Iterator[Finding]:
    told = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    missing = [name for name in _required() if not _is_installed(name)]
    if missing:
        again = f"pip install {' '.join(missing)}"
        yield Finding("packages", PROBLEM, f"not installed: {', '.join(missing)}", again)
    yield Finding("versions", OK, told)


def _required() -> list[str]:
    """Packages that segpipe cannot do without. OpenVINO is none: not every platform has it."""
    try:
        listed = metadata.requires("segpipe") or []
    except metadata.PackageNotFoundError:
        return []  # run from its sources
    names = [re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in listed if "extra ==" not in one]
    return [name for name in names if name != OPENVINO]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _hardware() -> Iterator[Finding]:
    yield Finding("cpu", OK, f"{cpu_name()}; {usable_cores()} of {os.cpu_count()} cores usable")
    limit = memory_limit_bytes()
    limited = "no limit" if limit is None else f"limit {bytes_text(limit)} (cgroup)"
    free, whole = bytes_text(usable_memory_bytes()), bytes_text(memory_bytes())
    yield Finding("memory", OK, f"{free} usable of {whole}, {limited}")


def _devices() -> Iterator[Finding]:
    found = _tried("device", _device, "install a build of torch for this machine: pytorch.org")
    yield found
    if found.state == OK and found.text.startswith("cpu") and NVIDIA.exists():
        yield Finding(
            "gpu",
            MISSING,
            "the NVIDIA driver is there, but torch sees no GPU",
            "install a build of torch with CUDA for this driver (pytorch.org), and look at "
            "CUDA_VISIBLE_DEVICES",
        )
    if not _is_importable(OPENVINO):
        yield Finding("backend", MISSING, f"{EAGER} alone: slower on a CPU", "pip install openvino")
    else:
        yield _tried("backend", _backends, "install openvino again, or set infer.backend=eager")


def _device() -> str:
    """The device that `auto` takes, after one sum on it."""
    import torch

    from segpipe.segmenter.devices import choose_device

    device = choose_device("auto")
    torch.ones(8, 8, device=device).sum().item()
    if device.type != "cuda":
        return f"{device.type}, by torch {torch.__version__}"
    each = []
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        each.append(f"{of.name}, {bytes_text(of.total_memory)}")
    return f"cuda {torch.version.cuda}: {'; '.join(each)}; by torch {torch.__version__}"


def _backends() -> str:
    from segpipe.segmenter.openvino import process_core

    devices = ", ".join(process_core().available_devices)
    return f"{OPENVINO} {metadata.version(OPENVINO)} ({devices}), {EAGER}"


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _extras() -> Iterator[Finding]:
    for extra, (modules, what) in EXTRAS.items():
        command = f"pip install 'segpipe[{extra}]'"
        try:
            for module in modules:
                _need(module)
        except (ImportError, OSError) as error:
            text = f"{what} ({printable(str(error), 200)})"
            yield Finding(f"[{extra}]", MISSING, text, command)
        else:
            yield Finding(f"[{extra}]", OK, what)


def _need(module: str) -> None:
    if module.startswith(_READERS):
        importlib.import_module(module)  # its libraries may be there and not load
    elif not _is_importable(module):
        raise ImportError(f"no module {module}")


def _models() -> Iterator[Finding]:
    try:
        paths = list_models()
    except SegpipeError as error:
        yield Finding("models", PROBLEM, str(error))
        return
    usable = []
    for path in paths:
        found = _tried("model", lambda path=path: read_card(path).name, f"remove {path}")  # type: ignore[misc]
        if found.state == OK:
            usable.append(path.stem)
        else:
            yield found
    if usable:
        yield Finding("models", OK, ", ".join(printable(name, 80) for name in usable))
    else:
        yield Finding("models", PROBLEM, "none", "install segpipe again")


def _kept() -> Finding:
    size = kept_bytes()
    if size is not None:
        return Finding("cache", OK, f"{cache_folder()}: {bytes_text(size)}")
    return Finding(
        "cache",
        MISSING,
        f"nothing can be kept in {cache_folder()}, so each process translates the network",
        f"set {FOLDER_VARIABLE} to a folder of yours",
    )


def _folder(key: str, folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    found = _tried(key, lambda: f"{folder}: {_written(there)}", "choose another folder")
    free = shutil.disk_usage(there).free
    if found.state == OK and free < LITTLE_BYTES:
        return Finding(key, PROBLEM, f"{folder}: {bytes_text(free)} free", "make room")
    return found


def _written(folder: Path) -> str:
    """How a folder took a file, as runs write and lock theirs."""
    free = shutil.disk_usage(folder).free
    size = min(WRITTEN_BYTES, free // 2)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".segpipe-doctor-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"files in {folder} cannot be locked: {error.strerror}") from error
        started = time.perf_counter()
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    return f"{bytes_text(free)} free, written at {size / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
