"""For all tests; here, where pytest lets a conftest name plugins."""

pytest_plugins = ["tests.loop_plugin", "tests.skip_plugin", "tests.kit.directory"]
