#!/bin/sh
# Print infra/prometheus/rules.yml, or FILE, as the PrometheusRule it is: the same text, two spaces further in.
#
#     infra/kuberay/monitoring/prometheus-rule.sh | kubectl apply -n purser -f -
cat <<'YAML'
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: purser
  labels: {release: prometheus}
spec:
YAML
sed 's/^/  /' "${1:-$(dirname "$0")/../../prometheus/rules.yml}"
