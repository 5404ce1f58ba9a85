"""What Keras files may hold, and what is refused before Keras sees it."""

import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.choose import framework_case
from gradcheck_cli.models.make import ModelOptions
from tests.framework_models.samples import KERAS_CODE, code, dense, keras, layers, mixed_up, replaced, saved


def refused(path: object, **options: object) -> SoftcheckError:
    with pytest.raises(SoftcheckError) as caught:
        framework_case(ModelOptions(path=str(path), **options))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    return caught.value


def payload(marker: Path) -> object:
    """A function whose byte code writes the marker."""
    text = f"lambda x: (open({str(marker)!r}, 'w').close(), x)[1]"
    return eval(text)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_lambda_layer_is_refused_and_does_not_run(tmp_path: Path, suffix: str) -> None:
    marker = tmp_path / "ran"
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Lambda(payload(marker))])
    path = saved(model, tmp_path / f"m.{suffix}")
    marker.unlink(missing_ok=True)
    problem = refused(path)
    assert "stores Python code (a Lambda layer" in problem.message
    assert "--trust-checkpoint" in (problem.hint or "")
    assert not marker.exists()
    trusted = framework_case(ModelOptions(path=path, trust=True))
    assert trusted is not None
    assert marker.exists()


def crafted(tmp_path: Path, layer: dict[str, object]) -> Path:
    """A whole .keras file whose last layer is replaced by this configuration."""
    path = Path(saved(dense(), tmp_path / "m.keras"))
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    config["config"]["layers"][-1] = layer
    return replaced(path, {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("os", "system", "system (os)"),
        ("evil_module", "Layer", "Layer (evil_module)"),
        ("builtins", "eval", "eval (builtins)"),
        ("keras.utils", "get_file", "get_file (keras.utils)"),
        ("keras.config", "enable_unsafe_deserialization", "enable_unsafe_deserialization"),
        ("keras.src.saving.saving_lib", "load_model", "load_model"),
        ("kerasevil.layers", "Dense", "Dense (kerasevil.layers)"),
    ],
)
def test_foreign_modules_are_refused_and_not_imported(tmp_path: Path, module: str, name: str, said: str) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()")
    layer = {"module": module, "class_name": name, "config": {"command": f"touch {marker}"}, "registered_name": None}
    problem = refused(crafted(tmp_path, layer))
    assert "not Keras' own" in problem.message
    assert said in problem.message
    assert "--arch FILE.py" in (problem.hint or "")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["TFSMLayer", "TorchModuleWrapper", "JaxLayer"])
def test_layers_that_load_programs_are_refused(tmp_path: Path, name: str) -> None:
    layer = {"module": "keras.layers", "class_name": name, "config": {"filepath": "/x"}, "registered_name": None}
    assert f"loads another program ({name})" in refused(crafted(tmp_path, layer)).message


def test_a_vocabulary_in_another_file_is_refused(tmp_path: Path) -> None:
    config = {"name": "v", "vocabulary": "/etc/passwd"}
    layer = {"module": "keras.layers", "class_name": "StringLookup", "config": config, "registered_name": None}
    assert "names another file (StringLookup reads /etc/passwd)" in refused(crafted(tmp_path, layer)).message


def test_a_lambda_deep_in_a_configuration_is_found(tmp_path: Path) -> None:
    hidden = {"class_name": "__lambda__", "config": {"value": "AAAA"}}
    config = {"name": "d", "units": 3, "activation": {"any": [{"deep": hidden}]}}
    layer = {"module": "keras.layers", "class_name": "Dense", "config": config, "registered_name": None}
    assert "stores Python code" in refused(crafted(tmp_path, layer)).message


@pytest.mark.parametrize("name", ["../../outside.txt", "/tmp/outside.txt", "assets\\..\\outside"])
def test_members_that_point_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = replaced(Path(saved(dense(), tmp_path / "m.keras")), {name: b"x"})
    assert "points out of the archive" in refused(path).message


@pytest.mark.parametrize("kind", ["external link", "soft link", "external data", "virtual"])
def test_data_outside_an_hdf5_file_are_refused(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as other:
        other["data"] = np.ones((4, 3), np.float32)
    path = Path(saved(dense(), tmp_path / "m.h5"))
    with h5py.File(path, "r+") as root:
        group = root["model_weights"]
        if kind == "external link":
            group["more"] = h5py.ExternalLink(str(secret), "data")
        elif kind == "soft link":
            group["more"] = h5py.SoftLink("/model_weights")
        elif kind == "external data":
            group.create_dataset("more", (4,), "f4", external=[(str(tmp_path / "raw"), 0, 16)])
        else:
            layout = h5py.VirtualLayout(shape=(4, 3), dtype="f4")
            layout[:] = h5py.VirtualSource(str(secret), "data", shape=(4, 3))
            group.create_virtual_dataset("more", layout)
    assert "refused" in refused(path).message


def test_weights_that_claim_far_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as root:
        root.create_dataset("layers/dense/vars/0", shape=(1 << 40,), dtype="f4", chunks=(1 << 20,))
    assert "claims" in refused(path, arch="x.py:y").message


def test_custom_classes_need_their_file(tmp_path: Path) -> None:
    file = code(tmp_path, KERAS_CODE)
    source = {}
    exec(compile(file.read_text(), str(file), "exec"), source)
    path = saved(source["scaled"](), tmp_path / "m.keras")
    keras.saving.get_custom_objects().clear()  # as in a process that never saw the class
    problem = refused(path)
    assert "code that is not Keras' own: Scale" in problem.message
    case = framework_case(ModelOptions(path=path, arch=str(file)))
    assert case is not None
    assert case.native.names == ["dense.kernel", "dense.bias", "scale.scale"]
    assert case.twin is not None, case.no_twin


def damaged(tmp_path: Path) -> dict[str, Path]:
    """A dozen files that cannot be loaded."""
    whole, h5 = Path(saved(dense(), tmp_path / "m.keras")), Path(saved(dense(), tmp_path / "m.h5"))
    content, old = whole.read_bytes(), h5.read_bytes()
    with zipfile.ZipFile(whole) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    files = {
        "half.keras": content[: len(content) // 2],
        "head.keras": content[:20],
        "text.keras": b"not a zip",
        "empty.keras": b"",
        "flipped.keras": content.replace(b'"Dense"', b'"Dinse"', 1),
        "half.h5": old[: len(old) // 2],
        "text.h5": b"not HDF5 at all",
        "magic.h5": old[:8],
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    archives = {
        "no_weights.keras": {name: one for name, one in members.items() if "weights" not in name},
        "no_config.keras": {name: one for name, one in members.items() if name != "config.json"},
        "bad_json.keras": members | {"config.json": b"{"},
        "list.keras": members | {"config.json": b"[]"},
        "deep.keras": members | {"config.json": b'{"a":' * 900 + b"1" + b"}" * 900},
        "cut_weights.keras": members | {"model.weights.h5": members["model.weights.h5"][:2000]},
        "no_class.keras": members | {"config.json": b'{"class_name": "Nothing", "config": {}}'},
        "not_a_model.keras": members
        | {"config.json": b'{"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}}'},
    }
    for name, parts in archives.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, text in parts.items():
                archive.writestr(member, text)
    return {name: tmp_path / name for name in (*files, *archives)}


def test_damaged_files_are_one_line_each(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        left = set(tmp_path.rglob("*"))
        problem = refused(path)
        assert str(path) in problem.message, name
        assert "{" not in problem.message, name  # no configuration is poured out
        assert set(tmp_path.rglob("*")) == left, name


def test_a_missing_file_is_told_as_missing(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.keras").message


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    file = code(tmp_path, KERAS_CODE)
    path = tmp_path / "m.weights.h5"
    saved(mixed_up(), path)
    assert "holds weights without the model" in refused(path).message
    problem = refused(path, arch=f"{file}:scaled")
    assert "does not fit" in problem.message
    assert "unexpected" in problem.message
    assert "misshaped" in problem.message or "missing" in problem.message


def test_models_without_gradients_are_told(tmp_path: Path) -> None:
    frozen = dense()
    frozen.trainable = False
    assert "none of its 2 weight tensors is trainable" in refused(saved(frozen, tmp_path / "f.keras")).message
    empty = keras.Sequential([keras.Input((4,)), layers.Flatten()])
    assert "has no weights" in refused(saved(empty, tmp_path / "e.keras")).message
