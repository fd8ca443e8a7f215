"""Tests of the pages: a package, so that pytest ends their browser after the last of them."""
