"""A server that a proxy shows below a path, as `--root-path` of vLLM and uvicorn says.

Whether the proxy takes the path off or leaves it on, both are served; what the server says of its own paths has it.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

ROOT_PATH = web.AppKey("root_path", str)
"""Empty: none."""


def attach(app: web.Application, root: str, routes: Iterable[web.RouteDef]) -> None:
    """Serve `routes` at the top, and below `root` if that is not empty.

    Raises ValueError for a `root` that begins as a route does: whose a path is could not be told.
    """
    app[ROOT_PATH] = root
    for route in routes:
        if root and route.path.split("/")[1] == root.split("/")[1]:
            raise ValueError(f"{route.path} begins as {root}")
        app.add_routes([route])
        if root:
            below = [root, f"{root}/"] if route.path == "/" else [root + route.path]
            app.add_routes(
                [web.RouteDef(route.method, path, route.handler, {**route.kwargs}) for path in below]
            )


def own_path(request: web.Request) -> str:
    """The path of `request` without the proxy's: what it is called at the top.

    HAZARD: keys are asked for by it.
    """
    root, path = request.app[ROOT_PATH], request.path
    below = root and (path == root or path.startswith(f"{root}/"))
    return path[len(root) :] or "/" if below else path
