"""The model file: written and read, imported, found by name, and hostile."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from segpipe.errors import ModelError
from segpipe.models.card import ModelCard, parse_card
from segpipe.models.modelfile import (
    find_model,
    import_model,
    list_models,
    load_model,
    model_geometry,
    model_hash,
    read_card,
    write_model,
)
from segpipe.models.network import Network, build_network
from segpipe.models.tensors import storage_of

SHIPPED = "nuclei-fluorescence"
FIELDS: dict[str, Any] = {
    "name": "small",
    "architecture": {
        "name": "unet",
        "parameters": {"width": 2, "depth": 1, "padding": "same", "norm": "batch"},
    },
    "channels": ["nuclei"],
    "outputs": ["foreground", "interior"],
    "normalisation": {"kind": "percentile", "low": 1.0, "high": 99.8},
    "licence": "CC0-1.0",
    "training_data": "none",
}


def make(**fields: Any) -> ModelCard:
    return parse_card({**FIELDS, **fields}, "test")


def small_network() -> Network:
    torch.manual_seed(0)
    return build_network(*make().network_arguments)


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.safetensors"
    write_model(path, small_network(), make())
    return path


def rewrite(path: Path, change: Any) -> Path:
    """Change the header of a file, as an attacker would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


# --- written and read -----------------------------------------------------------------------------


def test_a_model_comes_back_as_it_was(small):
    network, card = load_model(small)
    expected = small_network().eval()
    assert card == make() == read_card(small)
    assert not network.training
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(image), expected(image))
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    network.train()(image)  # a training can go on: batch norm has its counter
    assert int(network.state_dict()["encoder.0.0.norm.num_batches_tracked"]) == 1


def test_the_same_model_gives_the_same_bytes(small, tmp_path):
    other = tmp_path / "other.safetensors"
    write_model(other, *load_model(small))
    assert other.read_bytes() == small.read_bytes()
    assert model_hash(other) == model_hash(small)
    assert len(model_hash(small)) == 16
    network, card = load_model(small)
    with torch.no_grad():
        network.head.bias += 1
    write_model(other, network, card)
    assert model_hash(other) != model_hash(small)


def test_kernels_stored_as_float16_are_rounded_once_and_float32_in_memory(tmp_path):
    network, path = small_network(), tmp_path / "half.safetensors"
    write_model(path, network, make(), storage="float16")
    loaded, card = load_model(path)
    assert card == make() and storage_of(path) == "float16"
    for key, value in network.state_dict().items():
        found = loaded.state_dict()[key]
        if key.endswith("num_batches_tracked"):
            continue
        assert found.dtype == torch.float32
        assert torch.equal(found, value.half().float() if value.dim() > 1 else value), key
    other = tmp_path / "other.safetensors"
    write_model(other, network, make())
    assert storage_of(other) == "float32" and model_hash(other) != model_hash(path)
    write_model(other, loaded, card, storage_of(path))  # as `models calibrate` does
    assert other.read_bytes() == path.read_bytes()


def test_float16_of_a_wide_network_is_half_the_bytes(tmp_path):
    card = make(architecture={"name": "unet", "parameters": {"width": 16, "depth": 2}})
    network, sizes = build_network(*card.network_arguments), {}
    for storage in ("float32", "float16"):
        write_model(tmp_path / "x.safetensors", network, card, storage)
        sizes[storage] = (tmp_path / "x.safetensors").stat().st_size
    assert 0.5 < sizes["float16"] / sizes["float32"] < 0.52


def test_a_weight_too_large_for_float16_is_refused(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.head.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"head\.weight is too large for float16"):
        write_model(tmp_path / "x.safetensors", network, make(), storage="float16")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(small, monkeypatch):
    before = small.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ModelError, match=r"cannot be written \(No space left"):
        write_model(small, small_network(), make())
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_a_network_that_is_not_the_cards_is_not_written(tmp_path):
    with pytest.raises(ModelError, match=r"tensor encoder\.0\.0\.conv\.weight has shape"):
        card = make(architecture={"name": "unet", "parameters": {"width": 3, "depth": 1}})
        write_model(tmp_path / "x.safetensors", small_network(), card)
    assert not list(tmp_path.iterdir())


def test_a_card_is_read_without_torch():
    code = (
        "import sys; from segpipe.models.modelfile import find_model, read_card; "
        f"print(read_card(find_model({SHIPPED!r})).name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SHIPPED, "False"]


# --- the shipped model ----------------------------------------------------------------------------


def test_shipped_model():
    path = find_model(SHIPPED)
    network, card = load_model(path)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_943_778
    assert card.name == path.stem == SHIPPED
    assert card.licence == "CC0-1.0"
    assert card.outputs == ("foreground", "interior")
    assert card.normalisation.model_dump() == {"kind": "percentile", "low": 1.0, "high": 99.8}
    assert card.decode.model_dump() == {
        "foreground": 0.3,
        "interior": (0.45,),
        "min_area": 20,
        "growth_levels": (0.4, 0.3, 0.2, 0.1, 0.0),
        "growth_steps": 16,
    }
    assert card.figures["AP at IoU .50"] == 0.873
    assert "one channel" in card.limits
    geometry = model_geometry(card)
    assert (geometry.context, geometry.halo, geometry.stride, geometry.exact) == (94, 96, 16, True)


# --- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"licens": "MIT"}, r"unknown key licens \(did you mean 'licence'\?\)"),
        ({"decode": {"forground": 0.5}}, r"unknown key decode\.forground \(did you mean 'foregrou"),
        ({"zzzzzz": 1}, r"unknown key zzzzzz$"),
        ({"licence": None}, "licence: .*string.*got None"),
        ({"decode": {"foreground": 1.5}}, r"decode\.foreground: .*less than or equal to 1.*1\.5"),
        ({"decode": {"foreground": float("nan")}}, r"decode\.foreground: .*finite"),
        ({"decode": {"interior": [0.3, 0.5]}}, r"interior must descend, got \[0\.3, 0\.5\]"),
        ({"decode": {"growth_levels": [0.4, 0.2]}}, "growth_levels must end in 0"),
        ({"decode": {"growth_levels": []}}, "growth_levels must end in 0"),
        ({"outputs": ["foreground", "foreground"]}, "outputs: expected one name or more, each on"),
        ({"outputs": ["interior"]}, "outputs must be"),
        ({"channels": []}, "channels: expected one name or more"),
        ({"channels": ["a/../b"]}, r"channels\.0"),
        ({"name": "../evil"}, "name: "),
        ({"normalisation": {"kind": "fixd"}}, "normalisation: .*'percentile', 'fixed'"),
        ({"normalisation": {"kind": "fixed", "low": 5, "high": 5}}, "low must be below"),
        ({"pixel_size_um": 0}, "pixel_size_um: .*greater than 0"),
        ({"format": 2}, "card format 2 is newer than this segpipe reads .1.; update"),
        ({"limits": "x" * 5000}, "limits: .*at most 4000 characters"),
    ],
)
def test_a_wrong_card_is_one_line_that_names_the_key(fields, message):
    with pytest.raises(ModelError, match=f"^test: .*{message}") as caught:
        make(**fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_key_is_named():
    fields = {key: value for key, value in FIELDS.items() if key not in ("licence", "channels")}
    with pytest.raises(ModelError, match=r"key channels is missing \(and 1 more problems\)"):
        parse_card(fields, "test")


def test_a_card_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make().name = "other"


@pytest.mark.parametrize(
    ("outputs", "classes"),
    [
        (["foreground", "interior"], False),
        (["foreground"], False),
        (["background", "foreground"], True),
        (["stroma", "tumour", "other"], True),
    ],
)
def test_outputs_that_exclude_one_another_are_classes(outputs, classes):
    assert make(outputs=outputs).classes is classes


def test_fixed_normalisation():
    card = make(normalisation={"kind": "fixed", "low": 0, "high": 255})
    assert card.normalisation.model_dump() == {"kind": "fixed", "low": 0.0, "high": 255.0}


# --- hostile files --------------------------------------------------------------------------------


def test_truncated_anywhere_is_one_line(small):
    data = small.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for size in (0, 1, 7, 8, 9, 8 + length // 2, 8 + length, len(data) // 2, len(data) - 1):
        small.write_bytes(data[:size])
        with pytest.raises(ModelError) as caught:
            load_model(small)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_not_believed(small, length):
    data = small.read_bytes()
    small.write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(ModelError, match="not a safetensors file, or cut short"):
        read_card(small)


def with_tensor(key: str, **entry: Any) -> Any:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        header[key] = {**header.get(key, {}), **entry}
        return header

    return change


def with_card(**fields: Any) -> Any:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        card = {**json.loads(header["__metadata__"]["card"]), **fields}
        return {**header, "__metadata__": {"card": json.dumps(card)}}

    return change


def without(key: str) -> Any:
    return lambda header: {name: value for name, value in header.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"[" * 100_000, "not JSON"),
        (lambda _: b"{}x", "not JSON"),
        (lambda _: b"[1]", "not a JSON object"),
        (without("__metadata__"), "no model card .* 'segpipe models import'"),
        (lambda header: {**header, "__metadata__": {"card": "{"}}, "the card is not JSON"),
        (lambda header: {**header, "__metadata__": {"card": "[" * 9999}}, "the card is not JSON"),
        (lambda header: {**header, "__metadata__": {"card": "3"}}, "the card is not a JSON object"),
        (lambda header: {**header, "__metadata__": 3}, "no model card"),
        (without("head.bias"), r"tensor head\.bias is missing \(1 of "),
        (with_tensor("evil", dtype="F32", shape=[1], data_offsets=[0, 4]), "tensor evil is none"),
        (with_tensor("head.bias", dtype="F64"), r"head\.bias is neither float32 nor float16"),
        (with_tensor("head.bias", dtype="BF16"), r"head\.bias is neither float32 nor float16"),
        (with_tensor("head.bias", dtype=3), r"head\.bias is neither float32 nor float16"),
        (with_tensor("head.bias", dtype="F16"), "not a usable safetensors file"),
        (with_tensor("head.bias", shape=[3]), r"head\.bias has shape \(3,\), .* \(2,\)"),
        (with_tensor("head.bias", shape=7), r"head\.bias has shape \(\)"),
        (with_tensor("head.bias", data_offsets=[0, 2**60]), "not a usable safetensors file"),
        (with_tensor("head.bias", data_offsets="x"), "not a usable safetensors file"),
        (with_tensor("head.bias", data_offsets=[0, 8]), "not a usable safetensors file"),
        (with_tensor("head.bias", data_offsets=[8, 0]), "not a usable safetensors file"),
        (with_tensor("head.bias", data_offsets=[-8, 0]), "not a usable safetensors file"),
        (
            with_card(architecture={"name": "unet", "parameters": {"width": 10**12}}),
            "width is 1000000000000; expected an integer",
        ),
        (
            with_card(architecture={"name": "unet", "parameters": {"depth": 60}}),
            "depth is 60; expected an integer from 1 to 7",
        ),
        (with_card(architecture={"name": "os.system"}), "architecture is 'os.system'"),
        (with_card(outputs=["foreground"]), r"tensor head\.weight has shape"),
        (with_card(channels=["a", "b"]), r"tensor encoder\.0\.0\.conv\.weight has shape"),
    ],
)
def test_a_hostile_header_is_one_line(small, change, message):
    rewrite(small, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(small)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_header_that_is_huge_is_not_read(small):
    text = b"{}" + b" " * 5 * 2**20
    small.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="not a safetensors file, or cut short"):
        read_card(small)


@pytest.mark.parametrize("bytes_of", ["zip", "legacy", *range(2, 6)])
def test_a_pickle_by_the_name_of_safetensors_is_told_to_be_one(tmp_path, bytes_of):
    path = tmp_path / "x.safetensors"
    target = tmp_path / "executed"
    if isinstance(bytes_of, int):
        path.write_bytes(pickle.dumps(Evil(target), protocol=bytes_of))
    else:
        content = {"weight": Evil(target)}
        torch.save(content, path, _use_new_zipfile_serialization=bytes_of == "zip")
    for use in (read_card, load_model, lambda path: import_model(path, tmp_path / "out", FIELDS)):
        with pytest.raises(ModelError, match=r"a pickle or zip.*rename it to \.pt") as caught:
            use(path)
        assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(tmp_path, value):
    network = small_network()
    with torch.no_grad():
        network.head.bias[1] = value
    path = tmp_path / "x.safetensors"
    write_model(path, network, make())
    with pytest.raises(ModelError, match=r"tensor head\.bias holds NaN or infinity"):
        load_model(path)


def test_a_file_that_is_not_there(tmp_path):
    for function in (read_card, load_model, model_hash):
        with pytest.raises(ModelError, match=r"cannot be read \(No such file"):
            function(tmp_path / "none.safetensors")


# --- by name --------------------------------------------------------------------------------------


def test_models_are_found_by_name_and_by_path(small, monkeypatch, tmp_path):
    assert find_model(SHIPPED).name == f"{SHIPPED}.safetensors"
    assert find_model(str(small)) == find_model(small) == small
    monkeypatch.chdir(tmp_path)
    assert find_model("small.safetensors") == Path("small.safetensors")
    with pytest.raises(ModelError, match="no model 'small'"):
        find_model("small")
    with pytest.raises(ModelError, match="no such model file"):
        find_model("folder/none.safetensors")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ModelError, match=f"did you mean '{SHIPPED}'.*known are {SHIPPED}"):
        find_model("nuclei-flourescence")


def test_the_users_folder_goes_first(small, monkeypatch, tmp_path):
    assert [path.stem for path in list_models()] == [SHIPPED, "nuclei-he"]
    monkeypatch.setenv("SEGPIPE_MODELS", str(tmp_path))
    assert find_model("small") == small
    assert [path.stem for path in list_models()] == [SHIPPED, "nuclei-he", "small"]
    mine = small.rename(tmp_path / f"{SHIPPED}.safetensors")
    assert find_model(SHIPPED) == mine
    monkeypatch.setenv("SEGPIPE_MODELS", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"SEGPIPE_MODELS is .* not a folder"):
        list_models()


# --- import ---------------------------------------------------------------------------------------


def assert_imported(path: Path, card: ModelCard) -> None:
    network, read = load_model(path)
    assert read == card
    expected = small_network().state_dict()
    assert all(torch.equal(expected[key], value) for key, value in network.state_dict().items())


FLAT = {
    "architecture": "unet",
    "in_channels": 1,
    "width": 2,
    "depth": 1,
    "outputs": ["foreground", "interior"],
    "normalisation": {"kind": "percentile", "low": 1.0, "high": 99.8},
    "foreground_threshold": 0.4,
    "interior_thresholds": [0.7, 0.5],
    "trained_on": "some images",
}


def test_import_of_safetensors_with_a_flat_card(tmp_path):
    source = tmp_path / "trial.safetensors"
    tensors = small_network().state_dict()  # with its counters of batches
    safetensors.torch.save_file(tensors, source, metadata={"card": json.dumps(FLAT)})
    with pytest.raises(ModelError, match="key name is missing"):
        import_model(source, tmp_path / "out.safetensors", {})
    card = import_model(
        source,
        tmp_path / "out.safetensors",
        {
            "name": "small",
            "channels": ["nuclei"],
            "licence": "CC0-1.0",
            "architecture": FIELDS["architecture"],
        },
    )
    assert_imported(tmp_path / "out.safetensors", card)
    assert card.training_data == "some images"
    assert (card.decode.foreground, card.decode.interior) == (0.4, (0.7, 0.5))


def test_import_of_our_own_file_changes_the_card(small, tmp_path):
    card = import_model(small, tmp_path / "out.safetensors", {"name": "renamed"})
    assert card == make(name="renamed")
    assert_imported(tmp_path / "out.safetensors", card)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("shape", ["bare", "wrapped", "parallel", "half"])
def test_import_of_a_state_dict(tmp_path, suffix, shape):
    state: dict[str, Any] = dict(small_network().state_dict())
    if shape == "wrapped":
        state = {"epoch": 3, "model_state_dict": state}
    elif shape == "parallel":
        state = {f"module.{key}": value for key, value in state.items()}
    elif shape == "half":
        state = {key: value.double() for key, value in state.items()}
    source = tmp_path / f"weights{suffix}"
    torch.save(state, source)
    card = import_model(source, tmp_path / "out.safetensors", FIELDS)
    assert_imported(tmp_path / "out.safetensors", card)


class Evil:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_is_never_executed(tmp_path):
    target = tmp_path / "executed"
    torch.save({"weight": Evil(target)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(target)))
    (tmp_path / "garbage.pt").write_bytes(b"no model")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("torch", "plain", "garbage", "empty", "list", "numbers", "absent"):
        with pytest.raises(ModelError, match=name) as caught:
            import_model(tmp_path / f"{name}.pt", tmp_path / "out.safetensors", FIELDS)
        assert "\n" not in str(caught.value)
    assert not target.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_pt_that_is_no_state_dict_is_told_what_it_is(tmp_path):
    network = small_network().eval()
    target = tmp_path / "executed"
    torch.save(network, tmp_path / "module.pt")
    torch.save({"weight": Evil(target)}, tmp_path / "code.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as torch.jit.save lays it out
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", b"")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"0" * 10_000_000)
    torch.save({"weight": torch.ones(2, 2).to_sparse()}, tmp_path / "sparse.pt")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "renamed.pt")
    for name, message in {
        "module": r"objects or code, such as segpipe\.models\.unet\.UNet, which is not run",
        "code": r"objects or code, such as \S+, which is not run",
        "script": "a TorchScript program, which would have to be run",
        "bomb": "parts are compressed",
        "sparse": "tensor weight is sparse",
        "renamed": "something else, or is damaged",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            import_model(tmp_path / f"{name}.pt", tmp_path / "out.safetensors", FIELDS)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not target.exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_which_bytes_are_changed_is_one_line(tmp_path, zipped):
    """Whatever torch's reader raises for it; what still loads is checked tensor by tensor."""
    source = tmp_path / "weights.pt"
    torch.save(small_network().state_dict(), source, _use_new_zipfile_serialization=zipped)
    data, random, refused = source.read_bytes(), np.random.default_rng(0), 0
    start = data.index(b"encoder.0.0.conv.weight")
    for _ in range(150):
        changed = bytearray(data)
        for place in random.integers(start, start + 2000, 3):
            changed[place] = random.integers(256)
        source.write_bytes(changed)
        try:
            import_model(source, tmp_path / "out.safetensors", FIELDS)
        except ModelError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_a_tensor_of_any_shape_in_a_few_bytes_is_refused_before_it_is_made(tmp_path):
    state = dict(small_network().state_dict())
    state["head.bias"] = torch.zeros(1).expand(2**50)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"head\.bias has more values than the file"):
        import_model(tmp_path / "weights.pt", tmp_path / "out.safetensors", FIELDS)


def test_weights_that_are_not_numbers_are_not_imported(tmp_path):
    state = dict(small_network().state_dict())
    state["head.bias"] = torch.tensor([0.0, float("nan")])
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"head\.bias holds NaN"):
        import_model(tmp_path / "weights.pt", tmp_path / "out.safetensors", FIELDS)


def test_import_refuses_weights_of_another_architecture(tmp_path):
    source = tmp_path / "weights.pt"
    torch.save(small_network().state_dict(), source)
    fields = {**FIELDS, "architecture": {"name": "unet", "parameters": {"width": 4, "depth": 1}}}
    with pytest.raises(ModelError, match="is the card's architecture that of the weights"):
        import_model(source, tmp_path / "out.safetensors", fields)
