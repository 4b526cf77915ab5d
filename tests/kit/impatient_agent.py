"""An agent that gives a fork server little time to answer."""

from __future__ import annotations

import sys

from elastic_ep.host import agent
from elastic_ep.timing import Timing

Timing.server_reply_ms = 300
sys.exit(agent.main(int(sys.argv[1]), int(sys.argv[2])))
