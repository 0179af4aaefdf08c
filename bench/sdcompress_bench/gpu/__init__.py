"""The parts of `bench/gpu.py`, ten minutes on a card; each runs in its own process with a cap in seconds.

It writes into its folder:

    gpu.json     everything, rewritten as a whole after each part and every few seconds inside one
    rows.jsonl   the rows as the parts' processes wrote them, one a line; gpu.json is built from it
    gpu.log      tracebacks, and the output of pytest

`gpu.json`:

    schema        1
    settings      device (`cuda`, `cpu`) and smoke: both must be the same when a folder is continued
    card          name, memory_mib, compute, driver, cuda; null on a CPU
    environment   CPU, memory, clocks, OS, Python, package versions, commit (see `environment.py`)
    parts         by number: title, state, seconds, cap_s, and a reason unless the state is `ended`
                  state: `ended`, `cut` (killed at its cap), `failed` (its process died), `not begun` (no time was left)
    rows          part, row (unique in its part), figures, took_s; instead of figures, or beside them,
                  `failed`: what went wrong, or `skipped`: what this machine lacks
    headline      the figures that the project aims at; see `results.headline`
    minutes       of the last run
    seconds       of all runs into this folder

A figure's name ends with its unit: `step_ms`, `peak_mib`, `matmul_tflops`, `samples_per_s`; shares are of 1.

    part  rows, and the figures they have
    0     environment: whether CUDA works in a forked process, and which tools and libraries exist
    1     peaks: matmul_tflops, copy_gb_per_s for each precision
    2     `Execution` and `SharedMemory` over the stand-in engine: relative_l2 against limit_relative_l2
    3, 4  a UNet step: model, batch, mode, cuda_graph; step_ms (median of `blocks` blocks of calls; step_low_ms and
          step_high_ms are the 10th and 90th percentile), host_ms (until the call returns, the device idle before it),
          share_of_peak (of the matrix product measured in part 1), least_ms (no execution can be faster),
          relative_l2 to IEEE fp32 with the same weights, and its limit
    5     a picture: picture_ms, unet_calls, unet_ms, text_encoder_ms, vae_ms, gap_ms_per_step (the rest: work and
          waits of the host), synchronizations and synchronizations_per_step
    6     training: samples_per_s, share_of_peak, peak_mib
    7     one row for each test of `pytest -m gpu`, and their counts
    8     exported graphs (ONNX Runtime, TensorRT) as parts 3 and 4 have them; training nano
"""
