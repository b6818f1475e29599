"""Imported in the process that is forked (see `forking`): imports the libraries."""

from measuring.forking import import_libraries

import_libraries()
