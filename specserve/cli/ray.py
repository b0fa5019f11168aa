"""`specserve ray`: the server over replicas of its engine, placed by Ray Serve."""

from typing import Any

import click

from ..config import RayConfig
from ..errors import UserError
from .options import SETTINGS_HELP, debug_option, load_settings, settings_options


@click.command(epilog=SETTINGS_HELP)
@click.argument("settings_file", metavar="[CONFIG.yaml]", required=False, type=click.Path(dir_okay=False))
@settings_options(RayConfig, has_argument=False)
@debug_option
def ray(settings_file: str | None, **params: Any) -> None:
    """Serve over several replicas of the engine, on a Ray cluster or on this machine.

    The API is the server's, at one address. Requests go to replicas that have their adapter. Needs `pip install
    'specserve[ray]'`.
    """
    if settings_file is not None:
        if params["config_file"] is not None:
            raise click.UsageError("give the file of settings once: as CONFIG.yaml or as --config")
        params["config_file"] = settings_file
    config = load_settings(RayConfig, params)
    try:
        from ray import serve  # noqa: F401, whether it is there
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error}); pip install 'specserve[ray]'") from None
    from ..ray.run import serve_on_ray

    serve_on_ray(config)
