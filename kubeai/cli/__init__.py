"""The command line: serve · local · chat · top · key · usage · doctor · load · bench · uninstall ·
crd · mock-engine.

A user error is reported as one line on stderr with exit status 2, never as a traceback.
"""

# No postponed annotations: typer evaluates the annotations, which use names that are local to _app.
import sys
from typing import Annotated, Any

from kubeai.errors import KubeAIError

USAGE_ERROR = 2


def main() -> None:
    """Entry point of ``kubeai``."""
    try:
        if sys.argv[1:2] == ["mock-engine"]:
            # Engines start on demand while a request waits, so skip typer, which takes 150 ms to
            # import.
            from kubeai import mock_engine

            raise SystemExit(mock_engine.main(sys.argv[2:]))
        _app()()
    except KubeAIError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def _app() -> Any:
    import typer

    from kubeai.cli.chat import chat
    from kubeai.cli.crd import crd
    from kubeai.cli.doctor import doctor
    from kubeai.cli.key import key
    from kubeai.cli.load import load
    from kubeai.cli.local import local
    from kubeai.cli.openapi import openapi
    from kubeai.cli.serve import serve
    from kubeai.cli.top import top
    from kubeai.cli.uninstall import uninstall
    from kubeai.cli.usage import usage
    from kubeai.loadtest.commands import app as bench  # imports only typer
    from kubeai.terminal.help import help_of

    app = typer.Typer(
        name="kubeai",
        help="Inference gateway and model operator for Kubernetes.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def version(show: bool) -> None:
        if show:
            from kubeai import __version__

            print(__version__)
            raise typer.Exit

    @app.callback()
    def options(
        _: Annotated[
            bool,
            typer.Option("--version", callback=version, is_eager=True, help="Print the version."),
        ] = False,
    ) -> None:
        pass

    for command in (serve, local, chat, top, usage, doctor, load, uninstall, crd, openapi):
        app.command(help=help_of(command))(command)

    @app.command("mock-engine", add_help_option=False)
    def mock_engine() -> None:
        """Run a mock vLLM server: generated text, realistic timing, no GPU needed."""
        raise AssertionError("main() handles this command before typer is imported")

    app.add_typer(key(), name="key")
    app.add_typer(bench(), name="bench")
    return app
