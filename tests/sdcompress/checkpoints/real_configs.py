"""Configs of published models, as far as known: written from their documentation, not copied from their files.

Each is the entries in which the file differs from a config that the package ships, on top of that config.
"""

from __future__ import annotations

import json
from typing import Any

from sdcompress.families.configs import CONFIGS


def shipped(family: str, component: str) -> dict[str, Any]:
    name = "scheduler_config" if component == "scheduler" else "config"
    config: dict[str, Any] = json.loads((CONFIGS / family / component / f"{name}.json").read_text(encoding="utf-8"))
    return config


# What diffusers 0.21 wrote for every UNet, whether the model uses it or not.
_ALL_ENTRIES = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": None,
    "_diffusers_version": "0.21.4",
    "_name_or_path": "../some/folder",
}
_SSD_1B = {
    "transformer_layers_per_block": [0, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
_VEGA = {
    "transformer_layers_per_block": [0, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
_KOALA_700M = {"layers_per_block": 1, "transformer_layers_per_block": [0, 2, 5], "mid_block_type": None}

UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": ("sd1", {"_diffusers_version": "0.2.2", "mid_block_scale_factor": 1}),
    "runwayml/stable-diffusion-inpainting": ("sd1", {"in_channels": 9, "_diffusers_version": "0.6.0.dev0"}),
    "timbrooks/instruct-pix2pix": ("sd1", {"in_channels": 8, "upcast_attention": False}),
    "SimianLuo/LCM_Dreamshaper_v7": ("sd1", _ALL_ENTRIES | {"time_cond_proj_dim": 256}),
    "nota-ai/bk-sdm-small": ("sd1", {"layers_per_block": 1, "mid_block_type": None}),
    "stabilityai/stable-diffusion-2-1": ("sd2", {"sample_size": 96, "dual_cross_attention": False}),
    "stabilityai/sd-turbo": ("sd2", _ALL_ENTRIES | {"upcast_attention": False}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", _ALL_ENTRIES | {"addition_embed_type": "text_time"}),
    "stabilityai/sdxl-turbo": ("sdxl", _ALL_ENTRIES | {"sample_size": 64}),
    "segmind/SSD-1B": ("sdxl", _ALL_ENTRIES | _SSD_1B),
    "segmind/Segmind-Vega": ("sdxl", _ALL_ENTRIES | _VEGA),
    "etri-vilab/koala-700m-llava-cap": ("sdxl", _KOALA_700M),
}
VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "stabilityai/sd-vae-ft-mse": ("sd1", {"_diffusers_version": "0.4.2", "act_fn": "silu", "sample_size": 256}),
    "madebyollin/sdxl-vae-fp16-fix": ("sdxl", {"force_upcast": False, "latents_mean": None, "shift_factor": None}),
    "playgroundai/playground-v2.5-1024px-aesthetic": (
        "sdxl",
        {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, 0.4, -0.2], "latents_std": [9.9, 6.2, 7.5, 5.9]},
    ),
}
TEXT_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": (
        "sd1",
        {
            "bos_token_id": 0,
            "eos_token_id": 2,
            "dropout": 0.0,
            "torch_dtype": "float32",
            "transformers_version": "4.21",
        },
    ),
    "stabilityai/stable-diffusion-2-1": ("sd2", {"eos_token_id": 2, "_name_or_path": "hf-models/x", "dropout": 0.0}),
    "a text encoder with an attention of its own": ("sd1", {"_attn_implementation": "sdpa", "initializer_factor": 1}),
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "CompVis/stable-diffusion-v1-4": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "a DPM-Solver of diffusers 0.27": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "lambda_min_clipped": float("-inf"),
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "use_lu_lambdas": False,
        "variance_type": None,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    },
    "SimianLuo/LCM_Dreamshaper_v7": {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}
