"""A table, arrays or xarray become `ClusteredData`."""
