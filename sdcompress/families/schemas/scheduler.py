"""The config of a noise scheduler, and the schedulers that a pipeline of Stable Diffusion can hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sdcompress.families.schemas.base import ComponentSchema, require, within

SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' classes: its `KarrasDiffusionSchedulers`, the parallel ones, and those of LCM, TCD and SA-Solver."""

_VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
_AlgorithmType = Literal[
    "dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "data_prediction", "noise_prediction"
]
_NOISE = {"beta_start", "beta_end", "beta_schedule"}
"""diffusers' defaults of these are those of no published model, and would draw another picture without a word."""
_Sigma = Annotated[float, within(0, 1e5)]


class SchedulerSchema(ComponentSchema):
    """The arguments of all `SCHEDULERS`. Each takes its own and ignores the others, as diffusers does."""

    num_train_timesteps: Annotated[int, within(2, 100_000)] = 1000
    beta_start: Annotated[float, within(1e-9, 0.999)] = 0.0001
    beta_end: Annotated[float, within(1e-9, 0.999)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"] = "linear"
    trained_betas: Annotated[list[Annotated[float, within(0, 0.9999)]], Field(max_length=100_000)] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, within(0, 10)] = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, within(1e-6, 1)] = 0.995
    clip_sample_range: Annotated[float, within(1e-6, 1e6)] = 1.0
    sample_max_value: Annotated[float, within(1e-6, 1e6)] = 1.0
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False
    variance_type: _VarianceType | None = None
    skip_prk_steps: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_flow_sigmas: bool | None = False
    use_lu_lambdas: bool | None = False
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: _Sigma | None = None
    sigma_max: _Sigma | None = None
    sigma_data: Annotated[float, within(1e-6, 1e3)] = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: Annotated[float, within(0.01, 1e3)] = 7.0
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    solver_order: Annotated[int, within(1, 3)] = 2
    algorithm_type: _AlgorithmType = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    flow_shift: Annotated[float, within(1e-6, 1e3)] = 1.0
    lambda_min_clipped: Annotated[float, Field(le=1e3, allow_inf_nan=True)] = float("-inf")
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: Annotated[float, within(0, 1)] | None = None
    predict_x0: bool = True
    disable_corrector: Annotated[list[Annotated[int, within(0, 9999)]], Field(max_length=9999, default_factory=list)]
    solver_p: None = None
    tau_func: None = None
    original_inference_steps: Annotated[int, within(1, 100_000)] = 50
    timestep_scaling: Annotated[float, within(0, 1e6)] = 10.0
    predictor_order: Annotated[int, within(1, 4)] = 2
    corrector_order: Annotated[int, within(1, 4)] = 2

    @model_validator(mode="after")
    def _check_betas(self) -> SchedulerSchema:
        steps = self.num_train_timesteps
        missing = sorted(_NOISE - self.model_fields_set)
        require(
            not missing or self.trained_betas is not None or "sigma_data" in self.model_fields_set,
            f"lacks {', '.join(missing)}, which describe the noise",
        )
        require(self.beta_start <= self.beta_end, "beta_start is larger than beta_end")
        require(
            self.trained_betas is None or len(self.trained_betas) == steps,
            f"trained_betas has not one entry for each of {steps} timesteps",
        )
        require(self.lambda_min_clipped == self.lambda_min_clipped, "lambda_min_clipped is not a number")
        require(self.original_inference_steps <= max(steps, 50), "original_inference_steps is over num_train_timesteps")
        return self
