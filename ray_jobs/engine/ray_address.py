"""Whether a Ray cluster answers at an address, and takes this process's token: Ray itself tells only after 20 s."""

import os
import re

import grpc
from ray._private import services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from patterns import UserError

PATIENCE = 10.0  # seconds for an answer
# Any call does, since a token is asked for before the call is looked at.
CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
SENDING = ("token", "k8s")  # values of RAY_AUTH_MODE
TOKEN_REMEDY = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."


def resolve_address(address: str) -> str:
    """Return the HOST:PORT of the cluster that `auto` means on this machine; any other address as it is.

    Empty if Ray is to be started here. UserError if `auto` finds none: Ray itself would wait for minutes for a
    cluster whose head died.
    """
    if address != "auto":
        return "" if address == "local" else address
    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except Exception as error:  # it reads processes and files of others, which may end meanwhile
        raise no_answer_error(address) from error


def require_answer(address: str) -> None:
    """UserError where nothing answers at HOST:PORT, or asks for a token that this process does not have.

    Addresses of other forms, and clusters with TLS, are left to Ray.
    """
    if not re.fullmatch(r"[^/]+:\d+", address) or os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            headers = AuthenticationTokenLoader.instance().get_token_for_http_header()
            channel.unary_unary(CALL)(b"", timeout=PATIENCE, metadata=list(headers.items()))
        except AuthenticationError as error:
            raise no_token_error(address) from error
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise no_token_error(address) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise no_answer_error(address) from error


def no_answer_error(address: str) -> UserError:
    return UserError(f"--address {address}", "no Ray cluster answers there", "Check the address and RAY_AUTH_MODE.")


def no_token_error(address: str) -> UserError:
    """For a cluster that asks for a token, whether this process has another, or does not send it, or has none."""
    if os.environ.get("RAY_AUTH_MODE") not in SENDING:
        how = "RAY_AUTH_MODE is not token here, so none is sent"
    else:
        how = "the one given here is another" if has_token() else "none is given here"
    return UserError(f"--address {address}", f"the cluster asks for a token, and {how}", TOKEN_REMEDY)


def has_token() -> bool:
    try:
        return AuthenticationTokenLoader.instance().has_token()
    except AuthenticationError:
        return False


def version_error(address: str, told: str) -> UserError:
    """For a cluster of another Ray or Python, of which Ray tells in several lines."""
    what = " ".join(told.split()).replace("started with: Ray:", "started with Ray")
    return UserError(f"--address {address}", what.rstrip("."), "Take the same Ray and Python here as there.")
