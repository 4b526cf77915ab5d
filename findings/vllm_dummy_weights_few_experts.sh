#!/usr/bin/env bash
# vLLM 0.26.0 (vllm-project/vllm, PyPI) with torch 2.13.0, Python 3.11, x86-64 Linux, on a machine without a GPU. Its wheel asks
# for torch 2.11.0; what runs here is Python only, none of its kernels.
#
# Expected: with `--load-format dummy` the tokens of a mixture-of-experts model spread over its experts as they do with random
# weights. Its code says that the weights are random so that performance is measured accurately.
# Seen: its loader fills every floating-point tensor, norms and router biases too, evenly from -0.001 to 0.001. After such a norm
# the router's logits are far smaller than its bias, which then decides alone, in the same way for every token: 64 tokens reach
# 5 of gpt-oss's 32 experts and 10 of DeepSeek-V3's 256. Whoever measures a server so, or sizes hardware, has a model that reads
# a small part of its experts' weights. Integer tensors are left as they were made (zeros for gpt-oss's 4-bit codes, scales
# included), and of FP8 values 98 % round to zero. Routing without a bias does not suffer: tokens reach all experts.
# What helps: norms filled with ones after the load.
#
# The loader, norms, linear layers of the routers and DeepSeek's choice of experts are vLLM's classes, put together here in the
# models' shapes; gpt-oss's choice is the 4 largest logits. The tokens' states are random, of size 1. "as before training": norms
# 1, weights normal with deviation 0.02, biases 0. The test allows other counts (a CPU may round otherwise), not another picture.
#
# Output:
#   experts that 64 tokens reach          dummy   dummy, norms 1   as before training
#   gpt-oss, of 32                            5               32                   32
#   gpt-oss without a bias, of 32            32               32                   32
#   DeepSeek-V3, of 256                      10              222                  220
#   zeros after the load: 100% of 8-bit integers made as zeros, 98% of FP8 values
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
packages=(
    aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0
    anyio==4.16.0 attrs==26.1.0 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 certifi==2026.10.19.post1
    charset-normalizer==3.5.3 click==8.5.1 cloudpickle==3.1.3 einops==0.8.2 filelock==4.3.1 frozenlist==1.8.0
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20
    Jinja2==3.1.6 jiter==0.19.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 markdown-it-py==4.3.0
    MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 msgspec==0.23.0 multidict==7.2.1 networkx==3.6.1 numpy==2.4.6
    openai==3.57.0 openai-harmony==0.0.8 packaging==26.4 pillow==13.0.0 prometheus_client==0.26.0 propcache==0.5.4
    protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pydantic==2.14.4 pydantic_core==2.50.5
    Pygments==2.21.0 python-json-logger==4.2.0 PyYAML==6.0.4 pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.19
    requests==2.34.2 rich==15.0.0 rpds-py==2026.9.1 safetensors==0.8.0 sentencepiece==0.2.3 setproctitle==1.3.8
    shellingham==1.5.4 sniffio==1.3.1 sympy==1.14.0 tiktoken==0.14.0 tokenizers==0.23.3 torch==2.13.0 tqdm==4.70.1
    transformers==5.24.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0
    urllib3==2.8.0 uvloop==0.23.0 yarl==1.25.1
)
"$folder/venv/bin/pip" install -q "${packages[@]}"
"$folder/venv/bin/pip" install -q --no-deps vllm==0.26.0
cat >"$folder/try.py" <<'PY'
import sys

import torch
from torch import nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopk
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader


class GptOss(nn.Module):
    hidden, experts = 2880, 32

    def __init__(self, bias):
        super().__init__()
        self.norm = RMSNorm(self.hidden, eps=1e-5)
        self.router = ReplicatedLinear(self.hidden, self.experts, bias=bias, return_bias=False)

    def forward(self, x):
        logits = self.router(self.norm(x)).float()
        return logits.sort(dim=-1, descending=True, stable=True).indices[:, :4]


class DeepSeek(nn.Module):
    hidden, experts = 7168, 256

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(self.hidden, eps=1e-6)
        self.gate = GateLinear(self.hidden, self.experts, out_dtype=torch.float32)
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(self.experts, dtype=torch.float32))
        self.choose = GroupedTopk(8, True, 8, 4, "sigmoid", 2.5)

    def forward(self, x):
        x = self.norm(x)
        logits, _ = self.gate(x)
        return self.choose.forward_native(x, logits, self.gate.e_score_correction_bias)[1]


def reached(model):
    states = torch.randn(64, model.hidden, generator=torch.Generator().manual_seed(0))
    return model(states).unique().numel()


def as_before_training(model):
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.fill_(1.0)
        elif "bias" in name:
            tensor.zero_()
        else:
            tensor.normal_(0.0, 0.02, generator=generator)


def main():
    loader = DummyModelLoader(LoadConfig(load_format="dummy"))
    holds = True
    print("experts that 64 tokens reach          dummy   dummy, norms 1   as before training")
    for title, build, few in (
        ("gpt-oss, of 32", lambda: GptOss(bias=True), True),
        ("gpt-oss without a bias, of 32", lambda: GptOss(bias=False), False),
        ("DeepSeek-V3, of 256", DeepSeek, True),
    ):
        model = build()
        loader.load_weights(model, None)
        assert all(tensor.abs().max() <= 1e-3 for tensor in model.state_dict().values())
        dummy = reached(model)
        model.norm.weight.fill_(1.0)
        ones = reached(model)
        as_before_training(model)
        usual = reached(model)
        print(f"{title:36} {dummy:6} {ones:16} {usual:20}")
        most = 0.8 * model.experts
        holds &= ones >= most and usual >= most and (dummy < model.experts / 4 if few else dummy >= most)
    codes = nn.Module()
    codes.integers = nn.Parameter(torch.zeros(1 << 20, dtype=torch.uint8), requires_grad=False)
    codes.fp8 = nn.Parameter(torch.ones(1 << 20).to(torch.float8_e4m3fn), requires_grad=False)
    loader.load_weights(codes, None)
    zeros = [(tensor.float() == 0).float().mean().item() for tensor in (codes.integers, codes.fp8)]
    print("zeros after the load: {:.0%} of 8-bit integers made as zeros, {:.0%} of FP8 values".format(*zeros))
    return holds and zeros[0] == 1.0 and zeros[1] > 0.9


torch.set_default_dtype(torch.bfloat16)
with torch.no_grad(), set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
    init_distributed_environment(1, 0, f"file://{sys.argv[1]}/group", 0, "gloo")
    initialize_model_parallel()
    sys.exit(0 if main() else "this version does otherwise")
PY
export TMPDIR="$folder" VLLM_CACHE_ROOT="$folder/cache" VLLM_CONFIG_ROOT="$folder/config" HF_HOME="$folder/hf"
export VLLM_LOGGING_LEVEL=CRITICAL VLLM_NO_USAGE_STATS=1 TORCHDYNAMO_DISABLE=1
"$folder/venv/bin/python" "$folder/try.py" "$folder"
