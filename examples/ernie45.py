"""ERNIE 4.5, dense: an architecture added from outside the package.

    zerokl verify --model FOLDER --architecture examples/ernie45.py:ERNIE_45

A Llama whose rotary embedding turns neighbouring dimensions. SGLang builds it of Llama's attention and DeepSeek's MLP,
which are among the modules named here. ``architectures`` in ``config.json`` must say the name of SGLang's class, which
has one underscore more than transformers'.
"""

from zerokl.alignment.architectures import Architecture

ERNIE_45 = Architecture(
    name="Ernie4_5_ForCausalLM",
    sglang_module="ernie4",
    sglang_containers=(
        "Ernie4_5_ForCausalLM",
        "Ernie4Model",
        "Ernie4DecoderLayer",
        "LlamaAttention",
        "DeepseekV2MLP",
    ),
    interleaved_rotary=True,
    required=(("use_bias", False), ("rope_is_neox_style", False), ("moe_num_experts", None)),
)
