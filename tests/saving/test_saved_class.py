"""The decorator, on toy classes."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines import pipeline_loading_utils

import wellposed
from wellposed.saving import saved_class


class ToyScheduler(DDPMScheduler):
    pass


class ToyModel(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)


@pytest.fixture(params=[ToyScheduler, ToyModel])
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """A class as it would stand in a sub-package that bears the name of one of diffusers' own pipelines."""
    monkeypatch.setattr(request.param, "__module__", "wellposed.flux.somewhere")
    monkeypatch.setitem(wellposed.SAVED_CLASSES, request.param.__name__, __name__)
    return request.param


def test_address_is_the_package_even_in_a_folder_named_like_a_pipeline(toy: type) -> None:
    stored = pipeline_loading_utils._fetch_class_library_tuple
    assert stored(toy()) == ("flux", toy.__name__), "diffusers no longer has the trap that this test is about"
    assert saved_class(toy) is toy
    assert stored(toy()) == ("wellposed", toy.__name__)


def test_package_is_registered_once(toy: type, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"diffusers": {}}
    monkeypatch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", libraries)
    saved_class(toy)
    libraries["wellposed"]["Kept"] = ["save", "load"]
    saved_class(toy)
    assert libraries == {"diffusers": {}, "wellposed": {"Kept": ["save", "load"]}}


def test_missing_table_of_libraries_is_one_warning(toy: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    with pytest.warns(UserWarning, match="download the repository and load it from the folder"):
        saved_class(toy)
    assert toy.__module__ == "wellposed"


def test_pickle_and_deepcopy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyModel, "__module__", ToyModel.__module__)
    monkeypatch.setitem(wellposed.SAVED_CLASSES, "ToyModel", __name__)
    model = saved_class(ToyModel)(width=2)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is ToyModel
        assert torch.equal(twin.linear.weight, model.linear.weight)


def test_class_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="add 'ToyModel': '.*test_saved_class' to SAVED_CLASSES"):
        saved_class(ToyModel)


def test_dataclass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Output:
        sample: torch.Tensor

    monkeypatch.setitem(wellposed.SAVED_CLASSES, "Output", __name__)
    with pytest.raises(ValueError, match="is a dataclass"):
        saved_class(Output)


@pytest.mark.parametrize("name", ["ModelMixin", "SchedulerMixin", "DiffusionPipeline", "BaseGuidance"])
def test_bases_of_diffusers_are_resolved(name: str) -> None:
    import diffusers

    assert getattr(wellposed, name) is getattr(diffusers, name)


@pytest.mark.parametrize("name", ["PreTrainedModel", "PreTrainedTokenizerFast"])
def test_bases_of_transformers_are_resolved(name: str) -> None:
    import transformers

    assert getattr(wellposed, name) is getattr(transformers, name)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ProcessorMixin'"):
        _ = wellposed.ProcessorMixin
