# shellcheck shell=sh
# Sourced by a RUN of the Dockerfile: the builder's pip configuration and certificates, where they were given as build secrets. They are
# mounted for that RUN alone and leave nothing in a layer or in the history, as a build argument would.
if [ -s /run/secrets/pip.conf ]; then
  export PIP_CONFIG_FILE=/run/secrets/pip.conf
fi
if [ -s /run/secrets/ca.crt ]; then
  export PIP_CERT=/run/secrets/ca.crt SSL_CERT_FILE=/run/secrets/ca.crt GIT_SSL_CAINFO=/run/secrets/ca.crt
fi
