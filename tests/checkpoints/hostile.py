"""Makes hostile and damaged checkpoint files by name.

Each entry of HOSTILE writes a file that tries to create the file `marker` when it is loaded or called; DETONATE says how
to run it with torch alone, which proves that the payload is live. Each entry of DAMAGED writes a file that must end in
one clear line. All take the folder to write into and return the path.
"""

import argparse
import datetime
import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

Maker = Callable[[Path, Path], Path]


class Payload:
    """Creates the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (exec, (f"open({self.marker!r}, 'w').close()",))


class Forged:
    """Is unpickled as a tensor with arguments that no tensor has."""

    def __init__(self, *arguments: object, numbers: int = 4) -> None:
        self.arguments = arguments
        tensor = torch.arange(numbers, dtype=torch.float32)
        self.storage = torch.storage.TypedStorage(
            wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
        )

    def __reduce__(self):
        return (torch._utils._rebuild_tensor_v2, (self.storage, *self.arguments, False, OrderedDict()))


class SmallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def small_model() -> nn.Module:
    return SmallModel()


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None):
    """A copy of an archive of torch with changed and added members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, content in (extra or {}).items():
            new.writestr(f"{root}/{name}", content)
    return target


def exported_file(path: Path) -> Path:
    """A small program with a symbolic batch size."""
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small_model(), (torch.randn(3, 3),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def scripted_file(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)
    return path


class _SavesWhenCalled(nn.Module):
    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = str(marker)
        self.inner = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > 0:
            torch.save(x, self.marker)
        return self.inner(x)


class _SavesWhenLoaded(nn.Module):
    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = str(marker)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.marker)


def _code(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def _pickled(content: Callable[[Path], object], **options) -> Maker:
    def make(folder: Path, marker: Path) -> Path:
        path = folder / "hostile.pt"
        torch.save(content(marker), path, **options)
        return path

    return make


def _plain_pickle(folder: Path, marker: Path) -> Path:
    path = folder / "hostile.pkl"
    path.write_bytes(pickle.dumps({"w": Payload(marker)}))
    return path


def _script(kind: type[nn.Module]) -> Maker:
    return lambda folder, marker: scripted_file(folder / "hostile.pt", kind(marker))


def _script_alias(call: str) -> Maker:
    """A script whose source reaches torch.save under another name."""

    def make(folder: Path, marker: Path) -> Path:
        def change(name: str, content: bytes) -> bytes:
            if not name.endswith("hostile.py") or b"torch.save" not in content:
                return content
            line = next(line for line in content.decode().splitlines() if "torch.save" in line)
            indent = line[: len(line) - len(line.lstrip())]
            new = "\n".join(indent + part for part in call.format(marker=repr(str(marker))).splitlines())
            return content.decode().replace(line, new).encode()

        plain = scripted_file(folder / "plain.pt", _SavesWhenCalled(marker))
        return rewritten(plain, folder / "hostile.pt", change)

    return make


def _exported(change: Callable[[dict, Path], None]) -> Maker:
    """An exported program whose JSON was changed."""

    def make(folder: Path, marker: Path) -> Path:
        def edit(name: str, content: bytes) -> bytes:
            if name != "models/model.json":
                return content
            program = json.loads(content)
            change(program, marker)
            return json.dumps(program).encode()

        return rewritten(exported_file(folder / "plain.pt2"), folder / "hostile.pt2", edit)

    return make


def _size_is_code(program: dict, marker: Path) -> None:
    for value in program["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = _code(marker)


def _guard_is_code(program: dict, marker: Path) -> None:
    program["guards_code"] = [f"{_code(marker)} is None"]


def _operator_writes(program: dict, marker: Path) -> None:
    """Replaces relu by an operator that maps a file, and creates it."""
    for node in program["graph_module"]["graph"]["nodes"]:
        if "relu" in node["target"]:
            node["target"] = "torch.ops.aten.from_file.default"
            node["inputs"] = [
                {"name": "filename", "arg": {"as_string": str(marker)}, "kind": 1},
                {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
                {"name": "size", "arg": {"as_int": 4}, "kind": 1},
            ]


def _operator_is_attribute(program: dict, marker: Path) -> None:
    """Replaces relu by a function that the loader finds as an attribute of torch."""
    for node in program["graph_module"]["graph"]["nodes"]:
        if "relu" in node["target"]:
            node["target"] = "torch.os.mkdir"
            node["inputs"] = [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}]


def _name_is_code(program: dict, marker: Path) -> None:
    """Gives the input a name that ends in a default value."""
    text = json.dumps(program["graph_module"])
    program["graph_module"] = json.loads(text.replace('"features"', json.dumps(f"features={_code(marker)}")))


def _structure_is_code(program: dict, marker: Path) -> None:
    (marker.parent / "payload_module.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    context = json.dumps({"__enum__": True, "fqn": "payload_module:Kind", "name": "A"})
    leaf = {"type": "builtins.dict", "context": context, "children_spec": []}
    program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, leaf])


def _exported_samples(folder: Path, marker: Path) -> Path:
    stream = io.BytesIO()
    torch.save(((Payload(marker),), {}), stream)
    return rewritten(
        exported_file(folder / "plain.pt2"),
        folder / "hostile.pt2",
        lambda name, content: stream.getvalue() if name == "data/sample_inputs/model.pt" else content,
    )


def _exported_constant(prefix: str) -> Maker:
    """A constant that is stored as a pickle."""

    def make(folder: Path, marker: Path) -> Path:
        stream = io.BytesIO()
        torch.save(Payload(marker), stream)
        content = stream.getvalue() if prefix == "tensor_" else pickle.dumps(Payload(marker))
        entry = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}

        def change(name: str, old: bytes) -> bytes:
            return json.dumps({"config": {"c": entry}}).encode() if name.endswith("constants_config.json") else old

        plain = exported_file(folder / "plain.pt2")
        return rewritten(plain, folder / "hostile.pt2", change, {f"data/constants/{prefix}0": content})

    return make


def _exported_native(folder: Path, marker: Path) -> Path:
    plain = exported_file(folder / "plain.pt2")
    extra = {"data/aotinductor/model/code.so": b"\x7fELF" + str(marker).encode()}
    return rewritten(plain, folder / "hostile.pt2", lambda name, content: content, extra)


HOSTILE: dict[str, Maker] = {
    "zip": _pickled(Payload),
    "zip, beside weights": _pickled(lambda marker: {"model": small_model().state_dict(), "args": Payload(marker)}),
    "legacy": _pickled(Payload, _use_new_zipfile_serialization=False),
    "plain pickle": _plain_pickle,
    "script saves when called": _script(_SavesWhenCalled),
    "script saves when loaded": _script(_SavesWhenLoaded),
    "script renames torch": _script_alias("other = torch\nother.save(x, {marker})"),
    "script spells ops": _script_alias("ops.aten.save(x, {marker})"),
    "script asks getattr": _script_alias("getattr(torch, 'save')(x, {marker})"),
    "exported sample inputs": _exported_samples,
    "exported size": _exported(_size_is_code),
    "exported operator": _exported(_operator_writes),
    "exported attribute": _exported(_operator_is_attribute),
    "exported name": _exported(_name_is_code),
    "exported structure": _exported(_structure_is_code),
    "exported opaque object": _exported_constant("opaque_obj_"),
    "exported pickled tensor": _exported_constant("tensor_"),
    "exported native code": _exported_native,
}
# torch itself stops these two, the second for lack of a real library.
NOT_LIVE = frozenset({"exported attribute", "exported native code"})
# This one is loaded, but without the guard.
HOSTILE_GUARD: Maker = _exported(_guard_is_code)


def detonate(name: str, path: Path) -> None:
    """Let the payload of HOSTILE[name] run with torch or pickle alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("script"):
            torch.jit.load(path)(torch.ones(1, 3))
        elif name.startswith("exported"):
            torch.export.load(path).module()(torch.ones(2, 3))
        elif name == "plain pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)


def _saved(folder: Path, content: object, **options) -> Path:
    path = folder / "damaged.pt"
    torch.save(content, path, **options)
    return path


def _bytes(content: bytes, name: str = "damaged.pt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _cut(make: Callable[[Path], Path], share: float) -> Callable[[Path], Path]:
    def cut(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    return cut


def _flipped(make: Callable[[Path], Path], member: str) -> Callable[[Path], Path]:
    """One flipped byte within the content of a member."""

    def flip(folder: Path) -> Path:
        path = make(folder)
        with zipfile.ZipFile(path) as archive:
            content = archive.read(next(name for name in archive.namelist() if name.endswith(member)))
        whole = bytearray(path.read_bytes())
        whole[whole.index(content) + len(content) // 2] ^= 0x55
        path.write_bytes(whole)
        return path

    return flip


def _with_pickle(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "damaged.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", b"3\n")
        return folder / "damaged.pt"

    return make


def _claims(size: int) -> Callable[[Path], Path]:
    """A deflated record that claims to unpack to `size` bytes."""

    def make(folder: Path) -> Path:
        path = _with_pickle(b"\0" * 4096)(folder)
        with zipfile.ZipFile(path) as archive:
            true = archive.getinfo("archive/data.pkl").file_size
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", true), struct.pack("<I", size)))
        return path

    return make


def _doubled() -> list:
    """2**60 entries in 60 lists."""
    tree: list = [torch.ones(1)]
    for _ in range(60):
        tree = [tree, tree]
    return tree


def _tar(folder: Path) -> Path:
    with tarfile.open(folder / "damaged.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return folder / "damaged.pt"


def _state(folder: Path) -> Path:
    return _saved(folder, small_model().state_dict())


def _legacy_state(folder: Path) -> Path:
    return _saved(folder, small_model().state_dict(), _use_new_zipfile_serialization=False)


def _forged(*arguments: object, **options) -> Callable[[Path], Path]:
    return lambda folder: _saved(folder, {"w": Forged(*arguments)}, **options)


def _exported_damage(name: str, old: bytes, new: bytes) -> Callable[[Path], Path]:
    return lambda folder: rewritten(
        exported_file(folder / "plain.pt2"),
        folder / "damaged.pt2",
        lambda member, content: content.replace(old, new) if member == name else content,
    )


def _safetensors(header: bytes, claimed: int | None = None, data: bytes = b"") -> Callable[[Path], Path]:
    length = struct.pack("<Q", len(header) if claimed is None else claimed)
    return _bytes(length + header + data, "damaged.safetensors")


def _script_file(folder: Path) -> Path:
    return scripted_file(folder / "damaged.pt", small_model())


_LEGACY = {"_use_new_zipfile_serialization": False}

DAMAGED: dict[str, Callable[[Path], Path]] = {
    "empty": _bytes(b""),
    "text": _bytes(b"epoch,loss\n1,0.5\n"),
    "web page": _bytes(b"<!DOCTYPE html><html><body>404</body></html>"),
    "git lfs pointer": _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "hdf5": _bytes(b"\x89HDF\r\n\x1a\n" + bytes(64), "model.h5"),
    "gzip": _bytes(b"\x1f\x8b\x08" + bytes(64)),
    "tar": _tar,
    "npy": _bytes(b"\x93NUMPY\x01\x00" + bytes(64)),
    "random": _bytes(np.random.default_rng(0).bytes(4096)),
    "zip cut": _cut(_state, 0.6),
    "zip flipped": _flipped(_state, "/data.pkl"),
    "zip flipped record": _flipped(_state, "/data/0"),
    "legacy cut": _cut(_legacy_state, 0.6),
    "legacy cut early": _cut(_legacy_state, 0.1),
    "script cut": _cut(_script_file, 0.6),
    "script flipped": _flipped(_script_file, "/data.pkl"),
    "exported flipped": _flipped(lambda folder: exported_file(folder / "damaged.pt2"), "/weight_0"),
    "exported cut": _cut(lambda folder: exported_file(folder / "damaged.pt2"), 0.6),
    "exported graph": _exported_damage("models/model.json", b'"nodes"', b'"edges"'),
    "exported json": _exported_damage("models/model.json", b"{", b"["),
    "exported negative size": _exported_damage(
        "data/weights/model_weights_config.json", b'"as_int": 3', b'"as_int": -3'
    ),
    "exported huge size": _exported_damage(
        "data/weights/model_weights_config.json", b'"as_int": 3', b'"as_int": 300000000000'
    ),
    "exported version": _exported_damage("archive_version", b"0", b"9"),
    "zip bomb": _claims(3 << 30),
    "giant pickle": _with_pickle(b"\x80\x02" + b"]" * (17 << 20) + b"."),
    "deep pickle": _with_pickle(b"\x80\x02K\x00" + b"\x85" * 50_000 + b"."),
    "garbage pickle": _with_pickle(b"\x80\x02(((((tttt\x85R."),
    "giant string": _with_pickle(b"\x80\x02X\xff\xff\xff\xffabc."),
    "doubled lists": lambda folder: _saved(folder, _doubled()),
    "negative size": _forged(0, (-1, 4), (4, 1)),
    "outside the storage": _forged(0, (4,), (3,)),
    "beyond the storage": _forged(100, (4,), (1,)),
    "legacy outside the storage": _forged(0, (4,), (3,), **_LEGACY),
    "expanded": _forged(0, (1 << 40,), (0,)),
    "one tensor": lambda folder: _saved(folder, torch.ones(3)),
    "no tensors": lambda folder: _saved(folder, {"epoch": 3}),
    "optimizer": lambda folder: _saved(folder, torch.optim.Adam(small_model().parameters()).state_dict()),
    "namespace": lambda folder: _saved(folder, {"w": torch.ones(1), "args": argparse.Namespace(a=1)}),
    "path": lambda folder: _saved(folder, {"w": torch.ones(1), "to": Path("x"), "at": datetime.date(2020, 1, 1)}),
    "module": lambda folder: _saved(folder, small_model()),
    "legacy module": lambda folder: _saved(folder, small_model(), **_LEGACY),
    "protocol 4": lambda folder: _saved(folder, small_model().state_dict(), pickle_protocol=4),
    "meta": lambda folder: _saved(folder, {"w": torch.ones(3, device="meta")}),
    "safetensors cut": _safetensors(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', data=bytes(8)),
    "safetensors header beyond the file": _safetensors(b'{"w":{}}', claimed=1 << 40),
    "safetensors enormous header": _safetensors(b"{" + b" " * (17 << 20) + b"}"),
    "safetensors header": _safetensors(b'{"w":[[[['),
    "safetensors negative": _safetensors(b'{"w":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', data=bytes(16)),
}
