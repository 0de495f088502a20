"""Compilers and exporters: what was made of a model with a batch of two gives the model's output for others."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features_fx import GraphExtractNet
from torch.testing import assert_close

from timm_ltm import ClusterRefresh


class ExportContract:
    """Part of the contract of every model; see ``contract.py``.

    Attributes:
        any_size: Arguments with which timm's model takes images of several sizes, None where it does not.
        other_size: (H, W) of such images.
    """

    any_size: ClassVar[dict | None] = None
    other_size: ClassVar = (96, 96)

    def check_exported(self, exported, model):
        x = self.images(5)
        for batch in (1, 5):
            assert_close(exported(x[:batch]), model(x[:batch]).detach(), rtol=1e-4, atol=self.tolerance)

    def test_compile(self):
        self.check_compiled("ltm")

    @pytest.mark.slow
    def test_compile_of_every_method(self, method):
        self.check_compiled(method)

    def check_compiled(self, method):
        """One graph of warm-up, of training and of eval, over batches and epochs; what is observed in them arrives."""
        model, graphs = self.build(method, **self.shallow, merge_warmup_epochs=1).train(), []
        x = self.images()

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled, refresh = torch.compile(model, fullgraph=True, backend=backend), ClusterRefresh(model)
        y = torch.arange(len(x))
        for epoch in range(3):
            assert model.merging == (epoch > 0)
            eager = copy.deepcopy(model)
            observer = ClusterRefresh(eager)
            observer.labels(y)
            for step in range(2):
                refresh.labels(y)
                output = compiled(x + step)
                output.square().sum().backward()
                if not step:
                    expected = eager(x)
                    expected.square().sum().backward()
                    assert_close(output, expected, rtol=1e-4, atol=self.tolerance)
                    self.check_gradients(model, eager)
                model.zero_grad()
                refresh.step(y)
            report = refresh.epoch_end()
            assert [block["features"] for block in report.values()] == [2 * len(x)] * len(refresh.observers)
            assert len(graphs) == min(epoch + 1, 2)
        model.eval()
        for images in (x, x + 1):
            assert_close(compiled(images), model(images), rtol=1e-4, atol=self.tolerance)
        assert len(graphs) == 3

    @staticmethod
    def check_gradients(model, other):
        ours, theirs = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, other))
        assert ours.keys() == theirs.keys()
        scale = max(grad.abs().max() for grad in theirs.values())
        for name, grad in theirs.items():
            assert_close(ours[name], grad, rtol=1e-3, atol=1e-5 * float(scale), msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.slow
    def test_inductor(self, method, x):
        model = self.build(method, **self.shallow)
        torch._dynamo.reset()
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=self.tolerance)

    @pytest.mark.slow
    def test_another_size_compiles(self, method):
        """Compiled anew, sizes being constants of the graph: at each merge it may grow by four nodes."""
        if self.any_size is None:
            pytest.skip("timm's model has one size")
        nodes = []

        def backend(graph, inputs):
            nodes.append(len(graph.graph.nodes))
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        for model in (self.build_plain(**self.any_size), self.build(method, **self.any_size, **self.default_ratios())):
            torch._dynamo.reset()
            compiled, first = torch.compile(model, fullgraph=True, backend=backend), len(nodes)
            with torch.no_grad():
                for size in (self.size, self.other_size, (self.other_size[0], self.size[1])):
                    images = self.images(2, size=size)
                    assert_close(compiled(images), model(images), rtol=1e-4, atol=self.tolerance)
        plain, ours = nodes[:first], nodes[first:]
        merges = len(list(model.reducers()))
        assert len(ours) == 3
        assert max(ours) - ours[0] <= max(plain) - plain[0] + 4 * merges, nodes

    def default_ratios(self):
        """The family's own schedule, where the contract's merges in every block."""
        return {"compression_ratio": None}

    @pytest.mark.filterwarnings("ignore")
    def test_export(self):
        self.check_export("ltm")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_export_of_every_method(self, method):
        self.check_export(method)

    def check_export(self, method):
        model = self.build(method, **self.shallow)
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        self.check_exported(torch.export.export(model, (self.images(2),), dynamic_shapes=shapes).module(), model)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_export_any_size(self, method):
        if self.any_size is None:
            pytest.skip("timm's model has one size")
        model = self.build(method, **self.shallow, **self.any_size)
        auto = torch.export.Dim.AUTO
        exported = torch.export.export(model, (self.images(2),), dynamic_shapes=({2: auto, 3: auto},)).module()
        for size in (self.size, self.other_size):
            images = self.images(2, size=size)
            assert_close(exported(images), model(images), rtol=1e-4, atol=self.tolerance)

    @pytest.mark.filterwarnings("ignore")
    def test_onnx(self, method, tmp_path):
        """By the exporter that traces: many tools still ask for it."""
        self.check_onnx(
            self.build(method, **self.shallow), tmp_path, dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}}
        )

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_onnx_dynamo(self, method, tmp_path):
        pytest.importorskip("onnxscript")
        model = self.build(method, **self.shallow)
        self.check_onnx(model, tmp_path, dynamo=True, dynamic_shapes=({0: "batch"},))

    def check_onnx(self, model, folder, dynamo=False, **axes):
        onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        file, names = str(folder / "model.onnx"), {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(model, (self.images(2),), file, dynamo=dynamo, verbose=False, **names, **axes)
        assert not [node.op_type for node in onnx.load(file).graph.node if "Scatter" in node.op_type]
        session, x = runtime.InferenceSession(file), self.images(5)
        for batches in (x.split(1), (x,)):
            outputs = [session.run(None, {"x": batch.numpy()})[0] for batch in batches]
            apart = (torch.cat([torch.from_numpy(output) for output in outputs]) - model(x)).abs().amax(dim=1)
            # of small models' lines of noise some are as like as float32 can tell, and the order of sums decides
            assert apart.median() < 1e-4, apart

    @pytest.mark.parametrize("merging", [True, False])
    def test_fx(self, method, merging, x):
        """torchvision's extractor with timm's leaves, and timm's own."""
        model = self.build(method, **self.shallow)
        model.set_merging(merging)
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        leaves = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
        options = {**leaves, "param_shapes_constant": True}
        last = extraction.get_graph_node_names(model, tracer_kwargs=options)[1][-1]
        graph = extraction.create_feature_extractor(model, return_nodes=[last], tracer_kwargs=options)
        self.check_exported(lambda x: graph(x)[last], model)
        self.check_exported(GraphExtractNet(model, [last]), model)
        traced = copy.deepcopy(graph).train()  # its parameters are the model's
        traced(x)[last].square().sum().backward()
        model.train()(x).square().sum().backward()
        for name, parameter in traced.named_parameters():
            assert_close(parameter.grad, model.get_parameter(name).grad)

    @pytest.mark.filterwarnings("ignore")
    def test_script_is_refused(self, model):
        for merging in (True, False):
            model.set_merging(merging)
            with pytest.raises(ValueError, match=r"Use torch.export, torch.onnx.export or torch.compile"):
                torch.jit.script(model)

    @pytest.mark.filterwarnings("ignore")
    def test_int8(self, method, x):
        """Linear layers in 8 bits, quantised as they run."""
        model = self.build(method)
        expected = model(x)
        output = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)(x)
        assert torch.nn.functional.cosine_similarity(output, expected).median() > 0.95

    # Copies and files

    def test_copies(self, method, x):
        model = self.build(method)
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            other.set_merging(False)
            assert model.merging

    def test_state_dict_round_trip(self, method, x, tmp_path):
        model, other = self.build(method), self.build(method)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name != "reduction.settings":
                    tensor.mul_(1.1) if tensor.is_floating_point() else tensor.fill_(5)
        torch.save(model.state_dict(), tmp_path / "model.pth")
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
        assert torch.equal(other(x), model(x))
        assert other.epoch == 5
