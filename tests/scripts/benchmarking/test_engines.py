import pytest
import torch
from benchmark_pairs import tiny_pair

from benchmarking import engines


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", pytest.param("aotinductor", marks=pytest.mark.slow)])
def test_an_engine_computes_the_model(engine):
    if engine != "aotinductor":
        pytest.importorskip(engine)
    model = tiny_pair().fdconv.eval()
    images = torch.randn(1, 3, 16, 16)
    output = engines.deploy(model, images, 1, [engine])[engine]()
    output = output if isinstance(output, torch.Tensor) else output[0]
    torch.testing.assert_close(output, model(images).detach(), rtol=1e-4, atol=1e-4)


def test_an_engine_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "write_onnx", lambda *arguments: None)
    model = tiny_pair().fdconv.eval()
    monkeypatch.setattr(engines, "open_onnxruntime", lambda path, threads: lambda x: [model(x) * 1.01])
    with pytest.raises(RuntimeError, match=r"onnxruntime differs from the model by 1\.0e-02 of the largest output"):
        engines.deploy(model, torch.randn(2, 3, 16, 16), 1, ["onnxruntime"])


def test_eager_mode_needs_no_file():
    assert engines.deploy(tiny_pair().fdconv.eval(), torch.randn(1, 3, 16, 16), 1, ["eager", "compile"]) == {}
