"""Builds and checks a release: wheels, source distribution, image, charts, SBOMs and checksums.

`make release VERSION=1.2.3` runs ``python -m release build 1.2.3``. The package is not part of the
distribution. Every file in it that builds an artefact has a function ``build`` that reads the clean
clone, writes only to the folder of the release, and writes the same bytes each time.
"""
