"""The process that does exports one after another; `sdcompress_bench.export_jobs` starts it."""

from __future__ import annotations

from pathlib import Path

from sdcompress_engines.child_process import ignore_interrupts, receive_message, send_event
from sdcompress_engines.errors import SdCompressError

from sdcompress.export.onnx import export_onnx
from sdcompress.models.load import load_pipeline


def _serve() -> None:
    """Do each export that the parent sends, and send an event when it is done or has failed."""
    ignore_interrupts()
    while (job := receive_message()) is not None:
        try:
            loaded = load_pipeline(job["model"])
            export_onnx(
                loaded.pipeline,
                Path(job["folder"]),
                precision=job["precision"],
                source=job["source"],
                plan=loaded.plan,
                reuse=None if job["reuse"] is None else Path(job["reuse"]),
                force=True,
            )
        except SdCompressError as error:
            reason = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
            there = send_event(error=type(error).__name__, reason=reason)
        else:
            there = send_event(done=True)
        if not there:
            return


if __name__ == "__main__":
    _serve()
