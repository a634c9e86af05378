"""Check that a Ray cluster answers and accepts this process's token; Ray itself reports a failure only after 20 s."""

import os
import re

import grpc
from ray._private import services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from patterns import UserError

ANSWER_TIMEOUT = 10.0  # seconds
# Any method does, because the token is checked first.
METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"
SENDING_MODES = ("token", "k8s")  # values of RAY_AUTH_MODE with which Ray sends a token
TOKEN_REMEDY = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."


def resolve_address(address: str) -> str:
    """Return the HOST:PORT of the cluster on this machine for `auto`, and any other address unchanged.

    Args:
        address: The address that the user gave, or an empty string.

    Returns:
        The address; empty if Ray is to be started on this machine.

    Raises:
        UserError: If `auto` finds no cluster. Ray itself would wait for minutes for a cluster whose head died.
    """
    if address != "auto":
        return "" if address == "local" else address
    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except Exception as error:  # it reads other processes and their files, which may end meanwhile
        raise no_answer_error(address) from error


def require_answer(address: str) -> None:
    """Require that a cluster answers, and accepts this process's token.

    Args:
        address: HOST:PORT. Addresses of other forms, and clusters with TLS, are not checked.

    Raises:
        UserError: If nothing answers, or the cluster asks for a token that this process does not have.
    """
    if not re.fullmatch(r"[^/]+:\d+", address) or os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            headers = AuthenticationTokenLoader.instance().get_token_for_http_header()
            channel.unary_unary(METHOD)(b"", timeout=ANSWER_TIMEOUT, metadata=list(headers.items()))
        except AuthenticationError as error:
            raise no_token_error(address) from error
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise no_token_error(address) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise no_answer_error(address) from error


def no_answer_error(address: str) -> UserError:
    """Return the error for an address at which no cluster answers."""
    return UserError(f"--address {address}", "no Ray cluster answers there", "Check the address and RAY_AUTH_MODE.")


def no_token_error(address: str) -> UserError:
    """Return the error for a cluster that asks for a token which this process does not send."""
    if os.environ.get("RAY_AUTH_MODE") not in SENDING_MODES:
        cause = "RAY_AUTH_MODE is not `token` here, so this process sends none"
    else:
        cause = "this process has a different one" if has_token() else "this process has none"
    return UserError(f"--address {address}", f"the cluster asks for a token, but {cause}", TOKEN_REMEDY)


def has_token() -> bool:
    """Return whether Ray finds a token for this process."""
    try:
        return AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError:
        return False


def version_error(address: str, text: str) -> UserError:
    """Return the error for a cluster with another version of Ray or Python.

    Args:
        address: The cluster's address.
        text: Ray's own message, in several lines.
    """
    what = " ".join(text.split()).replace("started with: Ray:", "started with Ray")
    return UserError(f"--address {address}", what.rstrip("."), "Use the same versions of Ray and Python on both sides.")
