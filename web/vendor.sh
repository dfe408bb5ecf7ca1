#!/bin/sh
# Copies the bundled files and their licences. tests/studio/test_page.py has their hashes.
set -eu
to=../onecard/studio/static/vendor
cp node_modules/htm/preact/standalone.module.js "$to/preact-htm.js"
cp node_modules/uplot/dist/uPlot.esm.js "$to/uplot.js"
cp node_modules/uplot/dist/uPlot.min.css "$to/uplot.css"
for name in htm preact uplot; do cp "node_modules/$name/LICENSE" "$to/LICENSE-$name"; done
