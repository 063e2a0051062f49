import onnx
import onnxruntime
import pytest
import torch
from conftest import convnet
from torch import nn

from fasterai.deploy.export import export_onnx
from fasterai.sparsifier import Sparsifier


def test_a_sparse_network(tmp_path):
    model, x = convnet(), torch.randn(2, 1, 8, 8)
    model(x)
    Sparsifier(model).sparsify_model(90)
    path = export_onnx(model, tmp_path / 'a.onnx', x)
    graph = onnx.load(path).graph
    assert not [n for n in (*graph.node, *graph.initializer) if 'mask' in n.name]
    session = onnxruntime.InferenceSession(path)
    batch = torch.randn(7, 1, 8, 8)
    found, = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    assert torch.allclose(torch.from_numpy(found), model.eval()(batch), atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]
    weights = [onnx.numpy_helper.to_array(w) for w in graph.initializer if len(w.dims) == 4]
    assert sum(int((w == 0).sum()) for w in weights) > .7 * sum(w.size for w in weights)


def test_fixed_and_several_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.fc = nn.Embedding(10, 4), nn.Linear(8, 3)
        def forward(self, a, b): return self.fc(torch.cat([self.words(a).mean(1), b], 1)), b
    example = torch.randint(0, 10, (1, 5)), torch.randn(1, 4)
    session = onnxruntime.InferenceSession(export_onnx(Two(), tmp_path / 'a.onnx', example))
    assert [i.shape[1:] for i in session.get_inputs()] == [[5], [4]]
    assert isinstance(session.get_inputs()[0].shape[0], str)
    session = onnxruntime.InferenceSession(export_onnx(Two(), tmp_path / 'b.onnx', example, dynamic_batch=False))
    assert [i.shape for i in session.get_inputs()] == [[1, 5], [1, 4]]


def test_what_comes_out_otherwise_is_not_written(tmp_path, monkeypatch):
    (tmp_path / 'a.onnx').write_text('before')
    export = torch.onnx.export

    def export_another(model, *args, **more):
        nn.init.zeros_(model[0].weight)
        export(model, *args, **more)
        nn.init.ones_(model[0].weight)
    monkeypatch.setattr(torch.onnx, 'export', export_another)
    with pytest.raises(ValueError, match="onnxruntime does not compute for inputs of shape .* 'a.onnx' was not written|"
                                         "was not written"):
        export_onnx(nn.Sequential(nn.Linear(3, 3)), tmp_path / 'a.onnx', torch.randn(2, 3))
    assert (tmp_path / 'a.onnx').read_text() == 'before' and len(list(tmp_path.iterdir())) == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match='model: got int'): export_onnx(3, tmp_path / 'a', torch.randn(2))
    with pytest.raises(TypeError, match=r"example: got \[str\], expected tensors"): export_onnx(nn.Linear(2, 2), tmp_path / 'a', 'x')
    with pytest.raises(ValueError, match='example: got .* on which the model fails'):
        export_onnx(nn.Linear(2, 2), tmp_path / 'a', torch.randn(2, 3))


def test_inputs_that_are_no_tensors_are_refused(tmp_path):
    class Named(nn.Module):
        def forward(self, *, a): return a[0]
    for model, example, says in [(Named(), {'a': [torch.ones(2, 3)]}, r'example: got \[a=list\], expected tensors'),
                                 (nn.ReLU(), [torch.ones(2, 3)], r'example: got \[list\], expected tensors'),
                                 (nn.ReLU(), (), r'example: got \[\], expected tensors')]:
        with pytest.raises(TypeError, match=says): export_onnx(model, tmp_path / 'a', example)


def test_half_precision_and_one_tensor_twice(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).half()
    assert export_onnx(model, tmp_path / 'a.onnx', torch.randn(3, 8).half()).exists()

    class Twice(nn.Module):
        def forward(self, a, b): return a * 2 + b
    x = torch.randn(3, 4)
    assert export_onnx(Twice(), tmp_path / 'b.onnx', (x, x)).exists()


@pytest.mark.parametrize('path, says', [
    ('', "path: got ''"), ('.', "path: got '.'"), ('..', "path: got '..'"), ('folder', "path: got '.*folder'"), ('missing/a.onnx', "path: got '.*missing/a.onnx'"),
    ('file/a.onnx', "path: got '.*file/a.onnx'"), (None, 'path: got None'), (7, 'path: got 7'), (b'a', "path: got b'a'")])
def test_paths_are_looked_at_before_the_export(path, says, tmp_path, monkeypatch):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.onnx, 'export', lambda *a, **k: pytest.fail('it was exported'))
    with pytest.raises((OSError, TypeError), match=f'{says}, expected a file'): export_onnx(nn.Linear(2, 2), path, torch.randn(2, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder'] and not list((tmp_path / 'folder').iterdir())


@pytest.mark.filterwarnings('ignore')
def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match='model: got a ScriptModule'):
        export_onnx(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'a', torch.randn(2, 2))
    with pytest.raises(TypeError, match="dynamic_batch: got 'no', expected True or False"):
        export_onnx(nn.Linear(2, 2), tmp_path / 'a', torch.randn(2, 2), dynamic_batch='no')
    with pytest.raises(ValueError, match='example: got a tensor without axes, expected .*dynamic_batch=False'):
        export_onnx(nn.ReLU(), tmp_path / 'a', torch.tensor(1.))


def test_what_cannot_be_exported_is_said_in_our_words(tmp_path):
    class Cached(nn.Linear):
        def __init__(self): super().__init__(4, 4)
        def forward(self, x): return super().forward(x), object()
    cached = Cached()
    with pytest.raises(ValueError, match='Cached returns a object, which ONNX has no type for, expected tensors: return tensors alone'):
        export_onnx(cached, tmp_path / 'a.onnx', torch.randn(2, 4))
    cached.config = type('Config', (), {'use_cache': True})()
    with pytest.raises(ValueError, match='set model.config.use_cache = False'): export_onnx(cached, tmp_path / 'a.onnx', torch.randn(2, 4))

    class Graph(nn.Linear):
        def forward(self, x, edges): return super().forward(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
    graph, example = Graph(4, 4), (torch.randn(6, 4), torch.randint(0, 6, (2, 9)))
    with pytest.raises(ValueError, match='what was exported fails for inputs of shape .*; pass dynamic_batch=False where the first axis of an input is no batch'):
        export_onnx(graph, tmp_path / 'a.onnx', example)
    assert not list(tmp_path.iterdir())
    export_onnx(graph, tmp_path / 'a.onnx', example, dynamic_batch=False)


def test_the_cause_of_a_failed_export_is_said(tmp_path, monkeypatch):
    export, fails = torch.onnx.export, []

    def failing(model, *args, dynamic_shapes, **more):
        if dynamic_shapes or fails: raise RuntimeError('This is step 1/3\nNext steps') from KeyError('a view')
        export(model, *args, dynamic_shapes=dynamic_shapes, **more)
    monkeypatch.setattr(torch.onnx, 'export', failing)
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    with pytest.raises(ValueError, match="Sequential cannot be written by torch.onnx.export: KeyError: 'a view'; with dynamic_batch=False it can"):
        export_onnx(model, tmp_path / 'a.onnx', x)
    fails.append(1)
    with pytest.raises(ValueError, match="KeyError: 'a view'$"): export_onnx(model, tmp_path / 'a.onnx', x, dynamic_batch=False)
    assert not list(tmp_path.iterdir())


def test_keywords_are_inputs_by_their_names(tmp_path):
    class Masked(nn.Linear):
        def forward(self, x, mask=None, scale=1, *, shift): return super().forward(x) * mask * scale + shift
    model, example = Masked(4, 3), {'shift': torch.rand(1, 3), 'mask': torch.rand(1, 3), 'scale': 2, 'x': torch.randn(1, 4)}
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / 'a.onnx', example))
    assert {i.name for i in session.get_inputs()} == {'x', 'mask', 'shift'}
    batch = {'x': torch.randn(5, 4), 'mask': torch.rand(5, 3), 'shift': torch.rand(5, 3)}
    found, = session.run(None, {name: t.numpy() for name, t in batch.items()})
    assert torch.allclose(torch.from_numpy(found), model(**batch, scale=2), atol=1e-5)


def test_any_number_of_inputs(tmp_path):
    class Sum(nn.Linear):
        def forward(self, *parts): return super().forward(sum(parts))
    path = export_onnx(Sum(4, 3), tmp_path / 'a.onnx', (torch.randn(2, 4), torch.randn(2, 4)))
    assert len(onnxruntime.InferenceSession(path).get_inputs()) == 2


def test_attention_is_written_as_products_where_its_own_form_fails(tmp_path, monkeypatch):
    export = torch.onnx.export

    def failing(*args, **more):
        if torch.backends.cuda.flash_sdp_enabled(): raise RuntimeError('Cannot view')
        export(*args, **more)
    monkeypatch.setattr(torch.onnx, 'export', failing)
    assert export_onnx(nn.Linear(3, 3), tmp_path / 'a.onnx', torch.randn(2, 3)).exists()
    assert torch.backends.cuda.flash_sdp_enabled()
