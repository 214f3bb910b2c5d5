# A server for one trained run, from the registries' packages alone.
#
#   docker build -t gr4ad .
#   docker run -p 8000:8000 -v $PWD/runs/cj:/run/cj -v $PWD/data:$PWD/data gr4ad --workdir /run/cj
#
# run.json names the run's data by its path, which the second mount keeps as it is. Events and ads
# are kept below the run's folder; --store puts them elsewhere.
FROM python:3.12-slim

RUN useradd --create-home gr4ad
WORKDIR /home/gr4ad/src
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY gr4ad_jax ./gr4ad_jax
RUN pip install --no-cache-dir '.[redis]'

USER gr4ad
WORKDIR /home/gr4ad
ENV JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=/home/gr4ad/.cache/jax
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=10m \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/readyz')"]
ENTRYPOINT ["gr4ad", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
