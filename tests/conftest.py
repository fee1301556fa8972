"""A model folder in diffusers' layout, small and with every feature of the full size."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests don't use the hub; test_formats.py has a stand-in
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: see set_num_threads below

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import sample
from notebooks.toy import train
from support import parity, small

torch.set_num_threads(1)  # models this small lose more to waiting than they win from threads


def pytest_addoption(parser):
    parser.addoption("--weights", help="published weights, for test_official.py")
    parser.addoption("--noise", help="folder of the arrays that test_official.py reads")


def pytest_configure(config):
    config.addinivalue_line("markers", "full_size: needs 10 GB of disk and minutes; -m full_size")
    config.addinivalue_line("markers", "fuzz: damaged files and killed commands, minutes; -m fuzz")


def pytest_collection_modifyitems(config, items):
    """What takes long runs only on request."""
    for marker in ("full_size", "fuzz"):
        if marker not in config.option.markexpr:
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"takes long, needs -m {marker}"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """unet/, vae/, text_encoder/, tokenizer/. Copy it before changing it."""
    root = tmp_path_factory.mktemp("model")
    train.make_tokenizer(root / "tokenizer")
    configs = {part: dict(config) for part, config in small.SMALL.items()}
    configs["unet"] |= {"sample_size": 8, "cross_attention_dim": 32}
    configs["text_encoder"]["vocab_size"] = len(CLIPTokenizer.from_pretrained(root / "tokenizer"))
    for part, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        _, model_class = parity.CLASSES[part]
        config = parity.MODULES[part].config_from_json(configs[part])
        model = small.filled(model_class(config)).float()
        (root / part).mkdir()
        (root / part / "config.json").write_text(json.dumps(configs[part]))
        save_file(model.state_dict(), root / part / f"{file}.safetensors")
    return root


@pytest.fixture(scope="session")
def sd(folder):
    """The small model, loaded. Nothing may change it."""
    return sample.load(folder)
