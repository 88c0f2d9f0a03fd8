"""Every route of the installed Flower's port, and who may call it: a new version's new route fails here until it is judged."""

from __future__ import annotations

import pytest
from fastapi.routing import iter_route_contexts
from flwr.superlink.main import create_app

from edgelam_fl.federation.guard import ROUTES

CLOSED = {
    "/": "docs openapi.json docs/oauth2-redirect",
    # Nodes are registered by joining, runs bring their App; accounts, invitations, connectors and agents are of no use here.
    "/v1/control/": """
        register-node unregister-node start-automation list-automations stop-automation add-app remove-app list-apps
        list-app-associations list-connectors disconnect-connector begin-connector-oauth complete-connector-oauth
        get-login-details get-auth-tokens refresh-auth-tokens create-federation archive-federation set-federation-icon
        add-node-to-federation remove-node-from-federation remove-account-from-federation create-invitation list-invitations
        accept-invitation reject-invitation revoke-invitation configure-simulation-federation pull-artifacts
        list-run-series get-run-series update-run-series-description list-run-series-events
    """,
    # Tasks are taken inside the server's process. A ServerApp of this project starts no other task and talks to no agent.
    "/v1/runtime/": """
        acquire-task create-task start-automation responses get-connector push-task-message pull-task-message
        push-task-events record-task-usage get-run-series-events get-compacted-contexts put-compacted-context
    """,
}


@pytest.fixture(scope="module")
def offered() -> set[str]:
    return {str(context.path) for context in iter_route_contexts(create_app().routes)}


def test_every_route_of_flower_is_judged(offered: set[str]) -> None:
    closed = {f"{prefix}{name}" for prefix, names in CLOSED.items() for name in names.split()}
    assert not closed & ROUTES.keys(), "a route is both open and closed"
    assert offered == closed | ROUTES.keys()


def test_flowers_own_description_names_no_other_route(offered: set[str]) -> None:
    assert set(create_app().openapi()["paths"]) <= offered
