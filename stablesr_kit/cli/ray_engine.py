"""Restore the pictures of `stablesr restore` on a Ray cluster; all nodes must see the same folders."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from stablesr_kit.cli.jobs import Job, Report, Told, make_folder
from stablesr_kit.cli.messages import usage_error
from stablesr_kit.cli.restorer import Restorer, Restoring, find_model
from stablesr_kit.errors import StableSRKitError


class RayRestorer:
    """An actor that holds the model and restores the pictures it is given."""

    def __init__(self, restoring: Restoring) -> None:
        self.restorer = Restorer(restoring)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Restore the job of a row; returns its number, the error (empty if there is none), and what to tell."""
        try:
            companion = Path(row["companion"]) if row["companion"] else None
            job = Job(
                source=Path(row["source"]), target=Path(row["target"]), companion=companion, folder=Path(row["folder"])
            )
            make_folder(job.target.parent)
            told = self.restorer(job)
        except StableSRKitError as error:
            return {"index": row["index"], "error": str(error), "told": "[[], {}]"}
        return {"index": row["index"], "error": "", "told": json.dumps(told, default=float)}


def run_on_ray(jobs: list[Job], restoring: Restoring, report: Report, workers: int | None) -> None:
    """Map the pictures over actors of the cluster of RAY_ADDRESS, or of one that is started here.

    workers: number of actors; None is up to one per picture, as the cluster allows. Each takes a whole accelerator if
    the model runs on one. Ends the command if Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        usage_error("--engine ray needs Ray, which is not installed: pip install 'stablesr-kit[ray]'")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Workers have other working folders.
    restoring = replace(restoring, folder=restoring.folder.resolve(), model=str(find_model(restoring.model).resolve()))
    rows = [
        {
            "index": index,
            "source": str(job.source.resolve()),
            "target": str(job.target.resolve()),
            "companion": str(job.companion.resolve()) if job.companion else "",
            "folder": str(job.folder.resolve()),
        }
        for index, job in enumerate(jobs)
    ]
    restored = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, RayRestorer),
        fn_constructor_args=(restoring,),
        compute=ray.data.ActorPoolStrategy(size=workers) if workers else ray.data.ActorPoolStrategy(max_size=len(rows)),
        num_gpus=1 if restoring.device.type == "cuda" else None,
    )
    for row in restored.iter_rows():
        if row["error"]:
            report.fail(StableSRKitError(row["error"]), jobs[row["index"]].source)
        else:
            report.finish(jobs[row["index"]], Told(*json.loads(row["told"])))
