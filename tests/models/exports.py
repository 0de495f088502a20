"""Compilers and exporters: what was made of a model with a batch of two gives the model's output for others."""

from __future__ import annotations

import pytest
import torch
from timm.layers import set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules
from torch.testing import assert_close

from timm_ltm import ClusterRefresh

# "slots": the paper's clusters (of every slot, in its own width) with the default mask. timm.create_model drops
# arguments that are None, so only the preset gives these.
_ANCHORED = {"mask_form": "anchored", "mask_softmax": "slots", "first_mask": "anchors", "mask_mode": "sample"}
MODES = {
    "default": {},
    "update_off": {"update": False},
    "dense": {"mask_form": "dense"},
    "dense_carry": {"mask_form": "dense", "carry_mask": True},
    "learned": {"mask_form": "dense", "first_mask": "learned"},
    "paper": {"preset": "paper"},
    "slots": {"preset": "paper", **_ANCHORED},
    "carry": {"carry_mask": True},
    "batch": {"mask_mode": "batch"},
    "true_labels": {"labels": "true"},
    "own": {"map_lines": "own"},
    "straight": {"map_lines": "straight"},
    "even": {"map_lines": "even"},
}


class ExportContract:
    """Part of the contract of every model; see ``contract.py``."""

    def check_exported(self, exported, model):
        x = self.images(5)
        for batch in (1, 5):
            assert_close(exported(x[:batch]), model(x[:batch]).detach(), rtol=1e-4, atol=self.tolerance)

    def test_compile(self, x):
        """One graph in eval and one in training: no recompile between batches of one shape, or between epochs."""
        model, graphs = self.build(**self.shallow), []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled, refresh = torch.compile(model, fullgraph=True, backend=backend), ClusterRefresh(model)
        for images in (x, x + 1):
            assert_close(compiled(images), model(images))
        assert len(graphs) == 1
        model.train()
        for step in range(4):
            compiled(x + step).sum().backward()
            refresh.step(torch.arange(len(x)))
            if step % 2:
                refresh.epoch_end()
        assert len(graphs) == 2
        assert all(p.grad is not None for p in model.parameters())

    @pytest.mark.slow
    def test_inductor(self, x):
        model = self.build(**self.shallow)
        torch._dynamo.reset()
        assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=self.tolerance)

    @pytest.mark.filterwarnings("ignore")
    def test_trace(self, mode):
        model = self.build(**self.shallow, **MODES[mode])
        self.check_exported(torch.jit.trace(model, self.images(2), check_trace=False), model)

    @pytest.mark.parametrize("mode", ["default", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MODES)[1:])])
    def test_export(self, mode):
        model = self.build(**self.shallow, **MODES[mode])
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        self.check_exported(torch.export.export(model, (self.images(2),), dynamic_shapes=shapes).module(), model)

    @pytest.mark.filterwarnings("ignore")
    def test_onnx(self, mode, tmp_path):
        self.check_onnx(self.build(**self.shallow, **MODES[mode]), tmp_path, dynamic_axes={"x": {0: "batch"}})

    @pytest.mark.slow
    def test_onnx_dynamo(self, tmp_path):
        pytest.importorskip("onnxscript")
        self.check_onnx(self.build(**self.shallow), tmp_path, dynamo=True, dynamic_shapes=({0: "batch"},))

    def check_onnx(self, model, folder, dynamo=False, **axes):
        runtime, file = pytest.importorskip("onnxruntime"), str(folder / "model.onnx")
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(model, (self.images(2),), file, dynamo=dynamo, verbose=False, **names, **axes)
        session = runtime.InferenceSession(file)
        self.check_exported(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("merging", [True, False])
    def test_script(self, merging, tmp_path):
        self.check_script("default", merging, tmp_path)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_script_of_modes(self, mode, tmp_path):
        self.check_script(mode, True, tmp_path)

    @pytest.mark.filterwarnings("ignore")
    def test_script_in_training(self):
        """A graph is of the model's mode: in warm-up, while features are collected, it is timm's."""
        with set_scriptable(True):
            model = self.build(**self.shallow, merge_warmup_epochs=1)
        refresh = ClusterRefresh(model)
        model.train()
        assert refresh.model.collecting
        assert not model.merging
        x = self.images(2)
        expected = model(x)
        assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=self.tolerance)

    @pytest.mark.filterwarnings("ignore")
    def test_script_under_autocast(self):
        with set_scriptable(True):
            model = self.build(**self.shallow)
        scripted = torch.jit.script(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert scripted(self.images(2)).isfinite().all()

    def check_script(self, mode, merging, folder):
        with set_scriptable(True):
            model = self.build(**self.shallow, **MODES[mode])
        model.set_merging(merging)
        before = model(self.images(2))
        scripted = torch.jit.script(model)
        assert_close(model(self.images(2)), before, rtol=0, atol=0)  # the model itself is as it was
        self.check_exported(scripted, model)
        torch.jit.save(scripted, folder / "model.pt")
        self.check_exported(torch.jit.load(folder / "model.pt"), model)
        if self.any_size and not any(merger.tied for _, merger in model.mergers()):
            images = self.images(2, size=(2 * self.size[0], self.size[1]))
            assert_close(scripted(images), model(images), rtol=1e-4, atol=self.tolerance)

    @pytest.mark.filterwarnings("ignore")
    def test_fx_script(self):
        """As timm's tests do it: a graph with timm's leaves, scripted."""
        with set_scriptable(True):
            model = self.build(**self.shallow)
        graph, last = self.graph(model)
        scripted = torch.jit.script(graph)
        self.check_exported(lambda x: scripted(x)[last], model)

    def graph(self, model):
        """torchvision's extractor of the model's output, and the name of its last node."""
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        leaves = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
        options = {**leaves, "param_shapes_constant": True}
        last = extraction.get_graph_node_names(model, tracer_kwargs=options)[1][-1]
        return extraction.create_feature_extractor(model, return_nodes=[last], tracer_kwargs=options), last

    def test_fx(self, x):
        model = self.build(**self.shallow)
        graph, last = self.graph(model)
        self.check_exported(lambda x: graph(x)[last], model)
        graph.train()(x)[last].square().sum().backward()
        traced = {
            name: p.grad.clone() for name, p in graph.named_parameters()
        }  # the graph's parameters are the model's
        model.zero_grad()
        model.train()(x).square().sum().backward()
        assert_close(traced, {name: p.grad for name, p in model.named_parameters()})
