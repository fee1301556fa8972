"""What all tests share: a small model, and which tests run only on request."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the hub; support/hub.py is a stand-in
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: see set_num_threads below

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import sample
from notebooks.toy import train
from support import small

torch.set_num_threads(1)  # models this small lose more to waiting than they win from threads

ON_REQUEST = ("robustness", "browser", "fuzz", "full_size")  # in pyproject.toml; the longest last


def pytest_addoption(parser):
    parser.addoption("--weights", help="published weights, for test_official.py")
    parser.addoption("--fuzz-seed", type=int, default=0, help="other damage, for test_fuzz.py")
    parser.addoption("--noise", help="folder of the arrays that test_official.py reads")


def pytest_collection_modifyitems(config, items):
    """Skips what runs only on request, unless the last of its markers is in -m."""
    for item in items:
        markers = [marker for marker in ON_REQUEST if item.get_closest_marker(marker)]
        if markers and markers[-1] not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason=f"needs -m {markers[-1]}"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder in diffusers' layout, small and with every feature of the full size.

    Copy it before changing it.
    """
    root = tmp_path_factory.mktemp("model")
    train.make_tokenizer(root / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")

    configs = {part: dict(config) for part, config in small.SMALL.items()}
    configs["unet"] |= {"sample_size": 8, "cross_attention_dim": 32}
    configs["text_encoder"]["vocab_size"] = len(tokenizer)

    for name, part in sample.PARTS.items():
        config = part.config_from_json(configs[name])
        model = small.filled(part.model(config)).float()
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(configs[name]))
        save_file(model.state_dict(), root / name / part.files[0])
    return root


@pytest.fixture(scope="session")
def sd(folder):
    """The small model, loaded. Nothing may change it."""
    return sample.load(folder)
