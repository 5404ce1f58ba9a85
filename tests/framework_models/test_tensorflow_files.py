"""SavedModels and checkpoints of TensorFlow: what is refused, and the models in them."""

import shutil
from pathlib import Path

import pytest
import torch

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.choose import framework_case
from gradcheck_cli.models.framework.tf_model import silent
from gradcheck_cli.models.framework_case import FrameworkCase
from gradcheck_cli.models.make import ModelOptions
from gradcheck_cli.sources.imports import import_file
from tests.framework_models.samples import MODULES, Exported, code, layers, mixed_up, nested, tokens


def case_of(path: object, **options: object) -> FrameworkCase:
    case = framework_case(ModelOptions(path=str(path), **options))
    assert case is not None
    return case


def refused(path: object, **options: object) -> SoftcheckError:
    with pytest.raises(SoftcheckError) as caught:
        framework_case(ModelOptions(path=str(path), **options))
    assert "\n" not in caught.value.message
    return caught.value


def value(program: object) -> torch.Tensor:
    return program.call([one.value for one in program.arguments])[0][1]


def exported(path: Path, *, wrong: bool = False, signature: bool = True, dtype: object = tf.float32) -> Path:
    model = Exported(wrong=wrong, dtype=dtype)
    if signature:
        tf.saved_model.save(model, str(path), signatures=model.call)
    else:
        model.__dict__["call"], model.serve = None, model.call
        tf.saved_model.save(model, str(path))
    return path


@pytest.mark.parametrize("signature", [True, False])
def test_a_saved_model_has_the_gradient_of_its_custom_rule(tmp_path: Path, signature: bool) -> None:
    for wrong in (False, True):
        case = case_of(exported(tmp_path / f"m{wrong}", wrong=wrong, signature=signature), input_shapes=("5,4",))
        assert case.native.names == ["w"]
        assert set(case.stored) == {"w", "unused"}
        assert case.twin is None
        assert "traced" in case.no_twin
        program = case.native.output
        found = case.backend.reverse(lambda *a, p=program: [p.code(*a)], case.native.weights)
        (gradient,) = found.apply([torch.ones(5, 3)])
        weight = case.native.weights[0].clone().requires_grad_()
        inputs = torch.randn((5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
        ((inputs @ weight) ** 2).sum().backward()
        assert torch.allclose(gradient, weight.grad, rtol=1e-4, atol=1e-4) is not wrong


def test_a_saved_model_in_float64_is_its_own_twin(tmp_path: Path) -> None:
    case = case_of(exported(tmp_path / "m", dtype=tf.float64))
    assert case.twin is case.native


@pytest.mark.parametrize("make", [mixed_up, nested, tokens])
def test_keras_exports_are_read(tmp_path: Path, make: object) -> None:
    model = make()
    with silent():
        model.export(str(tmp_path / "m"), verbose=False)
    case = case_of(tmp_path / "m")
    assert len(case.native.names) == len(model.trainable_variables)
    assert all(len(name) > 2 for name in case.native.names), case.native.names
    assert value(case.native.loss).numel() == 1


class Writing(tf.Module):
    """A graph that writes a file when it is called."""

    def __init__(self, path: str, where: str) -> None:
        super().__init__()
        self.w = tf.Variable(tf.ones((4, 3)))

        def write() -> None:
            if where == "read":
                tf.io.read_file(path)
            elif where == "python":
                tf.py_function(Path(path).touch, [], [])
            else:
                tf.io.write_file(path, "x")

        def branch() -> object:
            write()
            return tf.constant(0.0)

        @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
        def call(x: object) -> object:
            if where == "loop":
                return x @ self.w + tf.cond(tf.reduce_sum(x) > 1e9, branch, lambda: tf.constant(0.0))
            write()
            return x @ self.w

        self.call = call


@pytest.mark.parametrize(
    ("where", "operator"),
    [("call", "WriteFile"), ("loop", "WriteFile"), ("read", "ReadFile"), ("python", "EagerPyFunc")],
)
def test_graphs_that_reach_outside_are_refused(tmp_path: Path, where: str, operator: str) -> None:
    marker = tmp_path / "written"
    model = Writing(str(marker), where)
    tf.saved_model.save(model, str(tmp_path / "m"), signatures=model.call)
    problem = refused(tmp_path / "m")
    assert operator in problem.message
    assert "nothing was run" in problem.message
    assert "--trust-checkpoint" in (problem.hint or "")
    assert not marker.exists()


def test_a_table_from_a_file_is_refused_and_one_of_constants_is_not(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\nb\n")

    class Looking(tf.Module):
        def __init__(self, initializer: object) -> None:
            super().__init__()
            self.w, self.table = tf.Variable(tf.ones((4, 3))), tf.lookup.StaticHashTable(initializer, -1)

            @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
            def call(x: object) -> object:
                return x @ self.w + tf.cast(self.table.lookup(tf.constant(["a"])), tf.float32)

            self.call = call

    key, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    read = tf.lookup.TextFileInitializer(str(tmp_path / "words.txt"), tf.string, key, tf.int64, number)
    model = Looking(read)
    tf.saved_model.save(model, str(tmp_path / "read"), signatures=model.call)
    assert "InitializeTableFromTextFileV2" in refused(tmp_path / "read").message
    model = Looking(tf.lookup.KeyValueTensorInitializer(["a"], tf.constant([1], tf.int64)))
    tf.saved_model.save(model, str(tmp_path / "kept"), signatures=model.call)
    assert case_of(tmp_path / "kept").native.names == ["w"]


def test_saving_outside_its_own_functions_is_refused(tmp_path: Path) -> None:
    class Saving(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(tf.ones((4, 3)))

            @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
            def call(x: object) -> object:
                tf.raw_ops.SaveV2(prefix=str(tmp_path / "out"), tensor_names=["x"], shape_and_slices=[""], tensors=[x])
                return x @ self.w

            self.call = call

    model = Saving()
    tf.saved_model.save(model, str(tmp_path / "m"), signatures=model.call)
    assert "SaveV2" in refused(tmp_path / "m").message
    assert not list(tmp_path.glob("out*"))


def test_damaged_saved_models_are_one_line_each(tmp_path: Path) -> None:
    whole = exported(tmp_path / "m")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    content = (whole / "saved_model.pb").read_bytes()
    (broken("half") / "saved_model.pb").write_bytes(content[: len(content) // 2])
    (broken("noise") / "saved_model.pb").write_bytes(b"\xff" * 100)
    (broken("empty") / "saved_model.pb").write_bytes(b"")
    shutil.rmtree(broken("no_variables") / "variables")
    (broken("no_data") / "variables/variables.data-00000-of-00001").unlink()
    (broken("no_index") / "variables/variables.index").unlink()
    (broken("no_graph") / "saved_model.pb").unlink()
    data = broken("short_data") / "variables/variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:4])
    said = {
        "half": "damaged or truncated",
        "noise": "damaged or truncated",
        "empty": "empty",
        "no_variables": "weights are missing",
        "no_data": "weights are missing",
        "no_index": "weights are missing",
        "no_graph": "without its saved_model.pb",
        "short_data": "cannot load it",
    }
    for name, wanted in said.items():
        assert wanted in refused(tmp_path / name).message, name


def test_a_saved_model_of_tensorflow_1_and_wrong_options_are_told(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, (None, 4))
        w = tf.compat.v1.Variable(tf.ones((4, 3)))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "old"), {"x": x}, {"y": x @ w})
    assert "TensorFlow 1" in refused(tmp_path / "old").message
    whole = exported(tmp_path / "m")
    assert "--arch has nothing to do" in refused(whole, arch="x.py:y").message
    assert "mode in which it was saved" in refused(whole, train=True).message
    assert "2×9 float32" in refused(whole, input_shapes=("2,9",)).message
    assert "not of jax" in refused(whole, backend="jax").message


# -- checkpoints


def written(folder: Path, *, wrapped: bool = True, **more: object) -> tuple[Path, Path, object]:
    """A checkpoint of a module, the code, and the module."""
    file = code(folder, MODULES)
    module = import_file(file, label="code").Net(**more)
    for one in module.trainable_variables:
        one.assign(tf.random.stateless_normal(one.shape, (3, 4)))
    prefix = folder / "ckpt" / "net"
    if wrapped:
        optimizer = tf.Variable(1.0)
        path = tf.train.Checkpoint(model=module, optimizer=tf.train.Checkpoint(rate=optimizer)).save(str(prefix))
    else:
        path = tf.train.Checkpoint(module).write(str(prefix))
    return Path(path), file, module


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_checkpoint_restores_the_users_module(tmp_path: Path, wrapped: bool) -> None:
    prefix, file, module = written(tmp_path, wrapped=wrapped)
    arch = f"{file}:Net"
    for path in (prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001", prefix.parent):
        case = case_of(path, arch=arch)
        assert torch.equal(case.stored["head.w"], torch.from_numpy(module.head.w.numpy()))
    assert sorted(case.native.names) == ["blocks.0.b", "blocks.0.w", "blocks.1.b", "blocks.1.w", "head.b", "head.w"]
    assert case.twin is not None, case.no_twin
    torch.testing.assert_close(value(case.native.output).double(), value(case.twin.output), rtol=1e-5, atol=1e-5)
    assert case.kind == "Net"


def test_modules_are_recorded_like_layers(tmp_path: Path) -> None:
    prefix, file, _ = written(tmp_path)
    case = case_of(prefix, arch=f"{file}:Net")
    assert [child.name for child in case.layers.children] == ["blocks.0", "blocks.1", "head"]
    module = import_file(file, label="code")
    before = module.Block.__call__
    calls = case.record()
    assert module.Block.__call__ is before
    assert [call.layer for call in calls] == ["blocks.0", "blocks.1", "head"]
    assert torch.equal(value(calls[-1].program), value(case.twin.output))
    assert all(bool(call.upstream[0].any()) for call in calls)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    prefix, file, _ = written(tmp_path)
    problem = refused(prefix, arch=f"{file}:Net", arch_kwargs='{"hidden": 7}')
    assert "misshaped" in problem.message
    assert "blocks.0.w: 4×5 in the file, 4×7 in the model" in problem.message
    assert "name a function that makes the model" in (refused(prefix).hint or "")
    assert "gives int" in refused(prefix, arch=f"{file}:not_a_model").message
    other = code(
        tmp_path,
        """
        import tensorflow as tf

        class Other(tf.Module):
            def __init__(self):
                super().__init__()
                self.header = tf.Variable(tf.zeros((6, 3)))

            def __call__(self, x):
                return x @ self.header
        """,
        "other.py",
    )
    problem = refused(prefix, arch=f"{other}:Other")
    assert "1 missing (header)" in problem.message


def test_a_model_with_a_fixed_signature_has_no_twin(tmp_path: Path) -> None:
    file = code(
        tmp_path,
        """
        import tensorflow as tf

        class Fixed(tf.Module):
            def __init__(self):
                super().__init__()
                self.w = tf.Variable(tf.ones((4, 3)))

            @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32)])
            def __call__(self, x):
                return x @ self.w
        """,
        "fixed.py",
    )
    module = import_file(file, label="fixed").Fixed()
    prefix = tf.train.Checkpoint(module).write(str(tmp_path / "fixed"))
    case = case_of(prefix, arch=f"{file}:Fixed")
    assert case.twin is None
    assert "in float64" in case.no_twin


def test_keras_models_in_checkpoints(tmp_path: Path) -> None:
    file = code(
        tmp_path,
        """
        import keras

        def build():
            return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="out")])
        """,
        "keras_code.py",
    )
    model = import_file(file, label="keras").build()
    prefix = tf.train.Checkpoint(model=model).save(str(tmp_path / "k"))
    case = case_of(prefix, arch=f"{file}:build")
    assert torch.equal(case.stored["out.kernel"], torch.from_numpy(model.layers[0].kernel.numpy()))
    assert case.twin is not None, case.no_twin
    assert isinstance(model.layers[0], layers.Dense)


def test_damaged_checkpoints_are_one_line_each(tmp_path: Path) -> None:
    prefix, file, _ = written(tmp_path)
    arch = f"{file}:Net"

    def copied(name: str) -> Path:
        folder = Path(shutil.copytree(prefix.parent, tmp_path / name))
        return folder / prefix.name

    index = copied("half")
    content = Path(f"{index}.index").read_bytes()
    Path(f"{index}.index").write_bytes(content[: len(content) // 2])
    assert "damaged or truncated" in refused(index, arch=arch).message
    noise = copied("noise")
    Path(f"{noise}.index").write_bytes(bytes(len(content) - 8) + content[-8:])
    assert "damaged" in refused(noise, arch=arch).message
    empty = copied("empty")
    Path(f"{empty}.index").write_bytes(b"")
    assert "empty" in refused(empty, arch=arch).message
    without = copied("without")
    Path(f"{without}.data-00000-of-00001").unlink()
    assert "numbers are missing" in refused(without, arch=arch).message
    short = copied("short")
    Path(f"{short}.data-00000-of-00001").write_bytes(b"\0")
    assert "damaged or incomplete" in refused(short, arch=arch).message
    part = copied("part")
    Path(f"{part}.index").unlink()
    assert "is missing" in refused(f"{part}.data-00000-of-00001", arch=arch).message
    listed = copied("listed").parent
    (listed / "checkpoint").write_text('model_checkpoint_path: "../../elsewhere/net-9"\n')
    assert "names net-9" in refused(listed, arch=arch).message
    (listed / "checkpoint").write_text("nothing")
    assert "names no checkpoint" in refused(listed, arch=arch).message


def test_a_checkpoint_of_tensorflow_1_is_told(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.Variable(tf.ones((4, 3)), name="w")
        session.run(tf.compat.v1.global_variables_initializer())
        prefix = tf.compat.v1.train.Saver().save(session, str(tmp_path / "old"))
    assert "TensorFlow 1" in refused(prefix, arch=f"{code(tmp_path, MODULES)}:Net").message
