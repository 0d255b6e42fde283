"""The reference of the acknowledgements: a bare Starlette endpoint with our uvicorn settings that reads and parses the
same body and answers. It checks no token, stores nothing and promises nothing.
"""

from __future__ import annotations

import json
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver.app.process import web_config


async def receive(request: Request) -> Response:
    json.loads(await request.body())
    return JSONResponse({"status": "ok"})


app = Starlette(routes=[Route("/callbacks/{provider}/{token}", receive, methods=["POST"])])

if __name__ == "__main__":
    uvicorn.Server(web_config(app, "127.0.0.1", int(sys.argv[1]))).run()
