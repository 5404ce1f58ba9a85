"""TensorFlow's tensors from torch's and back."""

import numpy as np
import pytest
import torch

from gradcheck_cli.errors import SoftcheckError
from tests.backends.tensorflow_here import tf

from gradcheck_cli.backends.tensorflow import TensorFlowBackend  # isort: skip  # after the check for TensorFlow

BACKEND = TensorFlowBackend()
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
]


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_numbers_go_there_and_back_bit_for_bit(dtype, shape):
    tensor = (torch.randn(shape) * 9).to(dtype)
    there = BACKEND.native(tensor)
    back = BACKEND.tensor(there, what="f", like=tensor)
    assert BACKEND.is_array(there) and tuple(there.shape) == shape
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(bits(back), bits(tensor))


def test_special_numbers_survive():
    tensor = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1e308], dtype=torch.float64)
    back = BACKEND.tensor(BACKEND.native(tensor), what="f", like=tensor)
    assert torch.equal(bits(back), bits(tensor))


def test_no_memory_is_shared_in_either_direction():
    tensor = normal(5)
    there = BACKEND.native(tensor)
    back = BACKEND.tensor(there, what="f", like=tensor)
    kept = tensor.clone()
    tensor.zero_()
    assert np.array_equal(there.numpy(), kept.numpy())
    back.zero_()
    assert np.array_equal(there.numpy(), kept.numpy())


def test_strides_conjugates_and_gradients_do_not_matter():
    tensor = normal(4, 3).T.requires_grad_()
    assert np.array_equal(BACKEND.native(tensor).numpy(), tensor.detach().numpy())
    number = torch.tensor([1 + 2j]).conj()
    assert BACKEND.native(number).numpy()[0] == 1 - 2j


def test_python_and_numpy_numbers_variables_and_slices_are_arrays_too():
    like = torch.zeros(())
    assert BACKEND.tensor(3, what="f", like=like).item() == 3
    assert BACKEND.tensor(np.float32(0.5), what="f", like=like).item() == 0.5
    assert BACKEND.tensor(tf.Variable([1.0, 2.0]), what="f", like=like).tolist() == [1.0, 2.0]
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([2, 2]), dense_shape=tf.constant([3, 1]))
    assert BACKEND.is_array(slices)
    assert BACKEND.tensor(slices, what="f", like=like).tolist() == [[0.0], [0.0], [3.0]]


def test_what_is_no_array_of_numbers_is_refused_with_a_hint():
    like, symbolic = torch.zeros(()), []
    tf.function(lambda x: symbolic.append(x) or x)(tf.constant(1.0))
    wrong = [None, torch.ones(2), "text", symbolic[0], tf.constant("text"), tf.sparse.eye(2), tf.ragged.constant([[1]])]
    for value in wrong:
        with pytest.raises(SoftcheckError, match=r"^my_function returned "):
            BACKEND.tensor(value, what="my_function", like=like)
    assert not BACKEND.is_array(None) and not BACKEND.is_array(torch.ones(2)) and BACKEND.is_array(symbolic[0])
    with pytest.raises(SoftcheckError, match="no float8_e5m2"):
        BACKEND.native(torch.ones(2).to(torch.float8_e5m2))


def test_a_device_that_is_not_there_is_refused():
    if BACKEND.information().devices != ("cpu",):
        pytest.skip("TensorFlow sees a graphics card here")
    with pytest.raises(SoftcheckError, match="sees no device cuda:0"), BACKEND.running([torch.empty(0)]):
        from gradcheck_cli.backends.tensorflow_arrays import place

        place(torch.device("cuda:0"))
