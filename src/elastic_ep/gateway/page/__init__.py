"""The live page at `/`: what it consists of, what it is told, and the films of losses."""
